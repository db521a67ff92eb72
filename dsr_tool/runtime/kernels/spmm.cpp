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

// Where the tile of one part lies; of what it writes and adds, as it would for channel 0.
struct Place {
    float* out;
    const float* residual;
    const float* bias;
    const int32_t* mask;
    int64_t out_step, residual_step;  // floats from one channel to the next

    Place(const Call& c, const Part& part, int64_t column)
        : out(c.out + (part.phase * c.op.out_stride + column) * LANES),
          residual(c.residual ? c.residual + (part.phase * c.op.other_stride + column) * LANES : nullptr),
          bias(c.op.bias),
          mask(c.op.mask ? c.op.mask + (part.phase * c.op.length + column) * LANES : nullptr),
          out_step(c.op.phases * c.op.out_stride * LANES),
          residual_step(c.op.phases * c.op.other_stride * LANES) {}

    // What the sums of one channel start from: in the first block its bias and what is added, later what they are.
    template <int T>
    void start(Vec* sums, int64_t row, bool first) const {
        if (!first) {
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) sums[t] = load(out + row * out_step + t * LANES);
            return;
        }
        const Vec value = splat(bias[row]);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = value;
        if (residual) {
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) sums[t] += load(residual + row * residual_step + t * LANES);
        }
    }
};

template <int T>
inline void finish(const Call& c, Vec* sums, const int32_t* mask, float* out) {
    if (c.clipped) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = clip(sums[t], c.low, c.high);
    } else if (c.rectified) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = sums[t] < c.low ? c.low : sums[t];
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
    const Place place(c, part, column);
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const bool first = b == part.first, last = b == part.last - 1;
        const char* in = (const char*)(c.in + (block.base + column) * LANES);
        const float* value = op.values + block.values;
        const uint16_t* offset = op.offsets + block.offsets;
        const Entry* entry = op.entries + block.entries;
        for (const Entry* end = entry + block.count; entry != end; entry++) {
            Vec sums[T];
            place.template start<T>(sums, entry->row, first);
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
            float* out = place.out + entry->row * place.out_step;
            if (last) {
                finish<T>(c, sums, place.mask, out);
            } else {
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) store(out + t * LANES, sums[t]);
            }
        }
    }
}

template <int T>
void dense_tile(const Call& c, const Part& part, int64_t column) {
    const Operation& op = c.op;
    const Place place(c, part, column);
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const bool first = b == part.first, last = b == part.last - 1;
        const char* in = (const char*)(c.in + (block.base + column) * LANES);
        const uint16_t* offset = op.offsets + block.offsets;
        const float* value = op.values + block.values;
        for (int64_t e = block.entries; e < block.entries + block.count; e++) {
            const Entry& entry = op.entries[e];
            Vec sums[4][T];
            int64_t row[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                // The last group repeats its last channel where there are less than four.
                row[r] = entry.row + r < op.channels ? entry.row + r : op.channels - 1;
                place.template start<T>(sums[r], row[r], first);
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
                float* out = place.out + row[r] * place.out_step;
                if (last) {
                    finish<T>(c, sums[r], place.mask, out);
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
    const Tile* tile;  // by width
    int64_t tiles;     // of each part
};

// Item i is one tile of one part. Parts that differ by their phase alone follow each other and read the same input,
// so they take their turns with each tile.
void run_item(const void* context, int64_t item) {
    const Work& work = *(const Work*)context;
    const Operation& op = work.call.op;
    const int64_t i = item / op.phases % work.tiles;
    const Part& part = op.parts[item / (op.phases * work.tiles) * op.phases + item % op.phases];
    // Tiles of nearly equal width: the wider ones first.
    const int64_t width = op.length / work.tiles, wider = op.length % work.tiles;
    work.tile[width + (i < wider)](work.call, part, i * width + (i < wider ? i : wider));
}

}  // namespace

void product(const Operation& op, const float* in, const float* residual, float* out, Pool* pool) {
    const bool any = op.activation == CLIP, above = any && op.low == 0 && op.high == INFINITY;
    const bool clipped = any && !above && (op.low != -INFINITY || op.high != INFINITY);
    const Call call{op, in, residual, out, clipped, above, splat(op.low), splat(op.high)};
    const bool dense = op.count && op.parts->dense;
    const int64_t most = dense ? WIDEST_DENSE : WIDEST, widest = op.inner < most ? op.inner : most;
    const Work work{call, dense ? DENSE : SPARSE, (op.length + widest - 1) / widest};
    parallel(pool, op.count * work.tiles, run_item, &work);
}
