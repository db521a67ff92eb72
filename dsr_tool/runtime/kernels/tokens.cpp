// What transformers need beside products: rows of features as planes and back, layer normalisation, softmax.

#include <cmath>

#include "kernels.h"

namespace {

struct Work {
    const Operation& op;
    const float* in;
    float* out;
};

// Row r of `inner` rows with `count` features is in lane r / length of vector r % length. Sixteen features at a time,
// so that what is read and what is written stays in the cache.
constexpr int64_t FEATURES = 16;

template <bool TO_PLANES>
void transpose_vector(const void* context, int64_t i) {
    const Work& work = *(const Work*)context;
    const Operation& op = work.op;
    const int64_t length = op.length, rows = op.inner, features = op.count;
    for (int64_t first = 0; first < features; first += FEATURES) {
        const int64_t last = first + FEATURES < features ? first + FEATURES : features;
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t row = lane * length + i;
            for (int64_t c = first; c < last; c++) {
                if (TO_PLANES)
                    work.out[(c * op.out_stride + i) * LANES + lane] = row < rows ? work.in[row * features + c] : 0;
                else if (row < rows)
                    work.out[row * features + c] = work.in[(c * op.in_stride + i) * LANES + lane];
            }
        }
    }
}

// Mean and variance over the channels of each place, in two passes.
void normalize_vector(const void* context, int64_t i) {
    const Work& work = *(const Work*)context;
    const Operation& op = work.op;
    const float* in = work.in + i * LANES;
    float* out = work.out + i * LANES;
    const int64_t step = op.in_stride * LANES;
    Vec total{}, squares{};
    for (int64_t c = 0; c < op.channels; c++) total += load(in + c * step);
    const Vec mean = total / (float)op.channels;
    for (int64_t c = 0; c < op.channels; c++) {
        const Vec d = load(in + c * step) - mean;
        squares += d * d;
    }
    Vec scale = squares / (float)op.channels + op.alpha;
    for (int l = 0; l < LANES; l++) scale[l] = 1.0f / std::sqrt(scale[l]);
    for (int64_t c = 0; c < op.channels; c++)
        store(out + c * op.out_stride * LANES, (load(in + c * step) - mean) * scale * op.values[c] + op.bias[c]);
}

void softmax_row(const Work& work, int64_t row) {
    const int64_t n = work.op.count;
    const float* in = work.in + row * n;
    float* out = work.out + row * n;
    Vec highest = splat(-INFINITY), total{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vec x = load(in + i);
        highest = select((x > highest) | (x != x), x, highest);
    }
    float most = largest(highest);
    for (; i < n; i++) most = in[i] > most || in[i] != in[i] ? in[i] : most;
    i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vec e = exponential(load(in + i) - most);
        store(out + i, e);
        total += e;
    }
    float rest = 0;
    if (i < n) {
        Vec last = splat(-INFINITY);
        std::memcpy(&last, in + i, 4 * (n - i));
        last = exponential(last - most);
        std::memcpy(out + i, &last, 4 * (n - i));
        for (int64_t k = 0; k < n - i; k++) rest += last[k];
    }
    const float factor = 1.0f / (sum(total) + rest);
    for (i = 0; i < n; i++) out[i] *= factor;
}

constexpr int64_t ROWS_AT_ONCE = 32;

void softmax_rows(const void* context, int64_t item) {
    const Work& work = *(const Work*)context;
    const int64_t begin = item * ROWS_AT_ONCE, rest = work.op.inner - begin;
    for (int64_t row = begin; row < begin + (rest < ROWS_AT_ONCE ? rest : ROWS_AT_ONCE); row++) softmax_row(work, row);
}

}  // namespace

void from_rows(const Operation& op, const float* in, float* out, Pool* pool) {
    const Work work{op, in, out};
    parallel(pool, op.length, transpose_vector<true>, &work);
}

void to_rows(const Operation& op, const float* in, float* out, Pool* pool) {
    const Work work{op, in, out};
    parallel(pool, op.length, transpose_vector<false>, &work);
}

void normalize(const Operation& op, const float* in, float* out, Pool* pool) {
    const Work work{op, in, out};
    parallel(pool, op.length, normalize_vector, &work);
}

void softmax(const Operation& op, const float* in, float* out, Pool* pool) {
    const Work work{op, in, out};
    parallel(pool, (op.inner + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, softmax_rows, &work);
}
