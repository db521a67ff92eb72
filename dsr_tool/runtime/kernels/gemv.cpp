// GEMV: sparse or dense weights times one vector, for linear layers on a single row.
//
//     out[r] = activation(bias[r] + residual[r] + sum over records k of row r: value[k] * in[base + offset[k]])
//
// There is one input, so no value is used twice and the weights' way from memory is the limit: 6 bytes for a weight
// that is not zero, 4 for each weight of a dense part; 3 and 1 for codes (weights.h), whose sums start from zero and
// get scaled before bias and residual are added. Records are read front to back and prefetched. Inputs are cut into
// blocks that stay in the first-level cache (compiler/gemv.py), and the sum of a row is stored between blocks. Several
// partial sums hide the latency of the additions.

#include "kernels.h"
#include "weights.h"

namespace dsr::DSR_LEVEL {

namespace {

// Four vectors of partial sums, then over lanes: rounds about as often as other implementations do.
template <class Weights, class W>
float dot(const W* a, const float* b, int64_t n) {
    Vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) sums[t] += Weights::vector_at(a + i + t * LANES) * load(b + i + t * LANES);
    float total = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; i < n; i++) total += Weights::at(a + i) * b[i];
    return total;
}

// Eight scalar sums: gather instructions are slower than single loads on the processors that were measured.
template <class Weights, class W>
float sparse_dot(const W* value, const uint16_t* offset, int64_t n, const float* x) {
    float sums[8] = {}, buffer[AT_ONCE];
    int64_t k = 0;
    for (; k + AT_ONCE <= n; k += AT_ONCE) {
        // Weights are read once a run, so they come from far away.
        for (int64_t i = 0; i < AT_ONCE; i += 64 / (int64_t)sizeof(W)) __builtin_prefetch(value + k + i + 1024);
        for (int64_t i = 0; i < AT_ONCE; i += 32) __builtin_prefetch(offset + k + i + 2048);
        const float* some = Weights::floats(value + k, buffer);
        for (int64_t i = 0; i < AT_ONCE; i += 8)
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++) sums[t] += some[i + t] * x[offset[k + i + t]];
    }
    for (; k < n; k++) sums[k & 7] += Weights::at(value + k) * x[offset[k]];
    return (sums[0] + sums[1] + (sums[2] + sums[3])) + (sums[4] + sums[5] + (sums[6] + sums[7]));
}

template <class Weights>
void run_part(const void* context, int64_t item) {
    const Call& call = *(const Call*)context;
    const Gemv& op = call.op.gemv;
    const Part& part = op.parts[item];
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const auto* value = Weights::of(op, op.values) + block.values;
        const uint16_t* offset = op.offsets + block.offsets;
        for (int64_t e = block.entries; e < block.entries + block.count; e++) {
            const Entry entry = op.entries[e];
            float* out = call.out + entry.row;
            const float shift = op.bias[entry.row] + (call.other ? call.other[entry.row] : 0);
            if (b == part.first) *out = Weights::SCALED ? 0 : shift;
            if (part.dense) {
                *out += dot<Weights>(value, call.source + block.base, entry.count);
            } else {
                *out += sparse_dot<Weights>(value, offset, entry.count, call.source + block.base);
                offset += entry.count;
            }
            if (Weights::SCALED && b == part.last - 1) *out = *out * op.scales[entry.row] + shift;
            value += entry.count;
        }
    }
}

}  // namespace

void gemv(const Call& call) {
    const Gemv& op = call.op.gemv;
    parallel(call.pool, op.part_count, op.codes ? run_part<Codes> : run_part<Floats>, &call);
    activate(call.op, call.out, op.rows);
}

}  // namespace dsr::DSR_LEVEL
