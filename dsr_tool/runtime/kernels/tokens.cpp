// The ops of transformers besides matmuls: FROM_ROWS, TO_ROWS, LAYER_NORM and SOFTMAX.
//
// Linear layers on tokens run as spmm on planes: features are channels, and the rows (tokens) lie in strips as pixels
// do. FROM_ROWS and TO_ROWS are the transposition between rows of features and such planes. LAYER_NORM works on planes
// too: the features of LANES rows pass by in vectors, so no sum over lanes is needed. SOFTMAX works on rows as they
// lie, since MATMUL, which computes the products of attention, writes rows.

#include <cmath>

#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

// Row r lies in lane r / length of vector r % length of every plane. Item i is vector i of all planes, 16 features at a
// time: the rows that are read and the vectors that are written then stay in the cache together.
constexpr int64_t FEATURES = 16;

void from_rows_vector(const void* context, int64_t i) {
    const Call& call = *(const Call*)context;
    const int64_t rows = call.op.from_rows.rows, features = call.op.from_rows.features;
    const int64_t length = call.op.length, stride = call.op.out_stride;
    for (int64_t first = 0; first < features; first += FEATURES) {
        const int64_t last = first + FEATURES < features ? first + FEATURES : features;
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t row = lane * length + i;
            for (int64_t c = first; c < last; c++)
                call.out[(c * stride + i) * LANES + lane] = row < rows ? call.source[row * features + c] : 0;
        }
    }
}

void to_rows_vector(const void* context, int64_t i) {
    const Call& call = *(const Call*)context;
    const int64_t rows = call.op.to_rows.rows, features = call.op.to_rows.features;
    const int64_t length = call.op.to_rows.source_length, stride = call.op.source_stride;
    for (int64_t first = 0; first < features; first += FEATURES) {
        const int64_t last = first + FEATURES < features ? first + FEATURES : features;
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t row = lane * length + i;
            for (int64_t c = first; c < last && row < rows; c++)
                call.out[row * features + c] = call.source[(c * stride + i) * LANES + lane];
        }
    }
}

// LAYER_NORM of the rows in vector i: the mean, the variance around it, and the result, in three passes over features.
// Two passes for the variance, since the difference of two large sums would lose its digits.
void norm_vector(const void* context, int64_t i) {
    const Call& call = *(const Call*)context;
    const Op& op = call.op;
    const float* in = call.source + i * LANES;
    float* out = call.out + i * LANES;
    const int64_t step = op.source_stride * LANES;
    Vec total{}, squares{};
    for (int64_t c = 0; c < op.channels; c++) total += load(in + c * step);
    const Vec mean = total / (float)op.channels;
    for (int64_t c = 0; c < op.channels; c++) {
        const Vec d = load(in + c * step) - mean;
        squares += d * d;
    }
    Vec scale = squares / (float)op.channels + op.layer_norm.epsilon;
    for (int l = 0; l < LANES; l++) scale[l] = 1.0f / std::sqrt(scale[l]);
    for (int64_t c = 0; c < op.channels; c++)
        store(out + c * op.out_stride * LANES,
              (load(in + c * step) - mean) * scale * op.layer_norm.scale[c] + op.layer_norm.shift[c]);
}

// SOFTMAX of one row: the largest entry (NaN wins), exponentials and their sum, the quotient. The
// largest is subtracted so that no exponential overflows. What does not fill a vector is taken as one padded with -inf.
void softmax_row(const Call& call, int64_t row) {
    const int64_t n = call.op.softmax.columns;
    const float* in = call.source + row * n;
    float* out = call.out + row * n;
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
    const Call& call = *(const Call*)context;
    const int64_t begin = item * ROWS_AT_ONCE, rest = call.op.softmax.rows - begin;
    for (int64_t row = begin; row < begin + (rest < ROWS_AT_ONCE ? rest : ROWS_AT_ONCE); row++) softmax_row(call, row);
}

}  // namespace

void from_rows(const Call& call) { parallel(call.pool, call.op.length, from_rows_vector, &call); }

void to_rows(const Call& call) { parallel(call.pool, call.op.to_rows.source_length, to_rows_vector, &call); }

void layer_norm(const Call& call) { parallel(call.pool, call.op.length, norm_vector, &call); }

void softmax(const Call& call) {
    parallel(call.pool, (call.op.softmax.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, softmax_rows, &call);
}

}  // namespace dsr::DSR_LEVEL
