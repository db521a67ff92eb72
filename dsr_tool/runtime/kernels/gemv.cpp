// Sparse and dense weights times one vector: linear layers on a single input.

#include "kernels.h"

namespace {

struct Work {
    const Operation& op;
    const float *in, *residual;
    float* out;
};

// Sums in vectors, then over lanes: as exact as the usual ways.
float dot(const float* a, const float* b, int64_t n) {
    Vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) sums[t] += load(a + i + t * LANES) * load(b + i + t * LANES);
    float total = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

float sparse_dot(const float* value, const uint16_t* offset, int64_t n, const float* x) {
    float sums[8] = {};
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
        // Weights are read once a run, so they come from far away.
        __builtin_prefetch(value + k + 1024);
        __builtin_prefetch(offset + k + 2048);
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) sums[t] += value[k + t] * x[offset[k + t]];
    }
    for (; k < n; k++) sums[k & 7] += value[k] * x[offset[k]];
    return (sums[0] + sums[1] + (sums[2] + sums[3])) + (sums[4] + sums[5] + (sums[6] + sums[7]));
}

void run_part(const void* context, int64_t item) {
    const Work& work = *(const Work*)context;
    const Operation& op = work.op;
    const Part& part = op.parts[item];
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const float* value = op.values + block.values;
        const uint16_t* offset = op.offsets + block.offsets;
        for (int64_t e = block.entries; e < block.entries + block.count; e++) {
            const Entry entry = op.entries[e];
            float* out = work.out + entry.row;
            if (b == part.first) *out = op.bias[entry.row] + (work.residual ? work.residual[entry.row] : 0);
            if (part.dense) {
                *out += dot(value, work.in + block.base, entry.count);
            } else {
                *out += sparse_dot(value, offset, entry.count, work.in + block.base);
                offset += entry.count;
            }
            value += entry.count;
        }
    }
}

}  // namespace

void rows(const Operation& op, const float* in, const float* residual, float* out, Pool* pool) {
    const Work work{op, in, residual, out};
    parallel(pool, op.count, run_part, &work);
    activate(op, out, op.channels);
}
