// Sparse weights times planes: every convolution, and products with matrices.
//
// A work record is the value of one weight and the distance, in vectors, from the output vector to the input vector
// that it multiplies. A tile of T neighbouring output vectors stays in registers while the records of one output
// channel pass by: one load of the value and T multiply-adds with operands from the first-level cache.

#include <cmath>

#include "kernels.h"

namespace {

#if DSR_LANES == 16 || defined(__aarch64__)
constexpr int WIDEST = 14, WIDEST_DENSE = 6;  // of 32 registers
#else
constexpr int WIDEST = 12, WIDEST_DENSE = 3;  // of 16 registers
#endif

// What does not change within one operation.
struct Call {
    const Operation& op;
    const float *in, *residual;
    float* out;
    bool clipped, rectified;
    Vec low, high;
};

// The vector that the sum of one output channel starts from in the first block.
inline Vec start(const Call& c, const Entry* entry, int64_t at) {
    Vec sum = splat(c.op.bias[entry->row]);
    return c.residual ? sum + load(c.residual + at) : sum;
}

template <int T>
inline void finish(const Call& c, Vec* sums, const int32_t* mask, float* out) {
    if (c.clipped) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = clip(sums[t], c.low, c.high);
    } else if (c.rectified) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = sums[t] < 0.0f ? Vec{} : sums[t];
    }
    if (mask) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            Bits inside;
            std::memcpy(&inside, mask + t * LANES, sizeof inside);
            sums[t] = masked(inside, sums[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) store(out + t * LANES, sums[t]);
    if (c.op.activation != CLIP) activate_masked(c.op, out, mask, T);
}

template <int T>
void sparse_tile(const Call& c, const Part& part, int64_t column) {
    const Operation& op = c.op;
    const int32_t* mask = op.mask ? op.mask + (part.phase * op.length + column) * LANES : nullptr;
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const bool first = b == part.first, last = b == part.last - 1;
        const char* in = (const char*)(c.in + (block.base + column) * LANES);
        const float* value = op.values + block.values;
        const uint16_t* offset = op.offsets + block.offsets;
        const Entry* entry = op.entries + block.entries;
        for (const Entry* end = entry + block.count; entry != end; entry++) {
            const int64_t plane = entry->row * op.phases + part.phase;
            const int64_t at = (plane * op.out_stride + column) * LANES;
            const int64_t other = (plane * op.other_stride + column) * LANES;
            Vec sums[T];
            if (first) {
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) sums[t] = start(c, entry, other + t * LANES);
            } else {
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) sums[t] = load(c.out + at + t * LANES);
            }
            const int count = entry->count;
            // Weights are read once a run, so they come from far away.
            __builtin_prefetch(value + 512);
            __builtin_prefetch(offset + 1024);
            // The address for the next record but one is made ahead: it waits for a load, which multiply-adds do not.
            // Behind the last record lies that of another channel, or what the plan put there.
            const char* now = in + (uint64_t)offset[0] * VECTOR_BYTES;
            const char* next = in + (uint64_t)offset[1] * VECTOR_BYTES;
            for (int k = 0; k < count; k++) {
                const Vec weight = splat(value[k]);
                const float* x = (const float*)now;
                now = next;
                next = in + (uint64_t)offset[k + 2] * VECTOR_BYTES;
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) sums[t] += weight * load(x + t * LANES);
            }
            value += count;
            offset += count;
            if (last) {
                finish<T>(c, sums, mask, c.out + at);
            } else {
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) store(c.out + at + t * LANES, sums[t]);
            }
        }
    }
}

template <int T>
void dense_tile(const Call& c, const Part& part, int64_t column) {
    const Operation& op = c.op;
    const int32_t* mask = op.mask ? op.mask + (part.phase * op.length + column) * LANES : nullptr;
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const bool first = b == part.first, last = b == part.last - 1;
        const char* in = (const char*)(c.in + (block.base + column) * LANES);
        const uint16_t* offset = op.offsets + block.offsets;
        const float* value = op.values + block.values;
        for (int64_t e = block.entries; e < block.entries + block.count; e++) {
            const Entry& entry = op.entries[e];
            Vec sums[4][T];
            int64_t plane[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                // The last group repeats its last channel where there are less than four.
                const int64_t row = entry.row + r < op.channels ? entry.row + r : op.channels - 1;
                plane[r] = row * op.phases + part.phase;
                const Entry own{(int32_t)row, 0};
                const int64_t at = (plane[r] * op.out_stride + column) * LANES;
                const int64_t other = (plane[r] * op.other_stride + column) * LANES;
#pragma GCC unroll 16
                for (int t = 0; t < T; t++)
                    sums[r][t] = first ? start(c, &own, other + t * LANES) : load(c.out + at + t * LANES);
            }
            for (int k = 0; k < entry.count; k++) {
                const float* x = (const float*)(in + (uint64_t)offset[k] * VECTOR_BYTES);
                Vec weight[4];
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) weight[r] = splat(value[4 * k + r]);
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) {
                    const Vec v = load(x + t * LANES);
#pragma GCC unroll 4
                    for (int r = 0; r < 4; r++) sums[r][t] += weight[r] * v;
                }
            }
            value += 4 * entry.count;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                float* out = c.out + (plane[r] * op.out_stride + column) * LANES;
                if (last) {
                    finish<T>(c, sums[r], mask, out);
                } else {
#pragma GCC unroll 16
                    for (int t = 0; t < T; t++) store(out + t * LANES, sums[r][t]);
                }
            }
        }
    }
}

using Tile = void (*)(const Call&, const Part&, int64_t);

constexpr Tile SPARSE[] = {nullptr,        sparse_tile<1>,  sparse_tile<2>,  sparse_tile<3>,  sparse_tile<4>,
                           sparse_tile<5>, sparse_tile<6>,  sparse_tile<7>,  sparse_tile<8>,  sparse_tile<9>,
                           sparse_tile<10>, sparse_tile<11>, sparse_tile<12>, sparse_tile<13>, sparse_tile<14>};
constexpr Tile DENSE[] = {nullptr,       dense_tile<1>, dense_tile<2>, dense_tile<3>,
                          dense_tile<4>, dense_tile<5>, dense_tile<6>};

struct Work {
    const Call& call;
    int64_t tiles[2];  // of sparse and of dense parts
};

// Item i is one tile of one part; items of one part follow each other.
void run_item(const void* context, int64_t item) {
    const Work& work = *(const Work*)context;
    const Operation& op = work.call.op;
    int64_t p = 0;
    while (item >= work.tiles[op.parts[p].dense]) item -= work.tiles[op.parts[p++].dense];
    const Part& part = op.parts[p];
    // Tiles of nearly equal width: the wider ones first.
    const int64_t n = work.tiles[part.dense], width = op.length / n, wider = op.length % n;
    const int64_t column = item * width + (item < wider ? item : wider);
    (part.dense ? DENSE : SPARSE)[width + (item < wider)](work.call, part, column);
}

}  // namespace

void product(const Operation& op, const float* in, const float* residual, float* out, Pool* pool) {
    const bool any = op.activation == CLIP, above = any && op.low == 0 && op.high == INFINITY;
    const bool clipped = any && !above && (op.low != -INFINITY || op.high != INFINITY);
    const Call call{op, in, residual, out, clipped, above, splat(op.low), splat(op.high)};
    const int64_t widest = op.inner < WIDEST ? op.inner : WIDEST;
    const Work work{call, {(op.length + widest - 1) / widest, (op.length + WIDEST_DENSE - 1) / WIDEST_DENSE}};
    int64_t items = 0;
    for (int64_t p = 0; p < op.count; p++) items += work.tiles[op.parts[p].dense];
    parallel(pool, items, run_item, &work);
}
