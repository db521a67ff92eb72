// SPMM: sparse or dense weights times planes. Every convolution, linear layers on several rows, average pools.
//
// The result, for each output channel r and each output vector i:
//
//     out[r][i] = activation(bias[r] + residual[r][i] + sum over records k of r: value[k] * in[base + offset[k] + i])
//
// A record is one weight and the distance, in vectors, from the output vector to the input vector that it multiplies.
// In the strip layout that distance is the same for all pixels, so a 3 x 3 convolution is a sparse matrix times shifted
// views of the input: no im2col and no unaligned load.
//
// Memory order. A tile of T neighbouring output vectors stays in registers while the records of one output
// channel pass by: one broadcast of the value, then T multiply-adds whose operands come from the first-level cache. Two
// loads a cycle are the limit, so a wide tile pays: the broadcast is shared by T multiply-adds. Channels that a tile
// reads are cut into blocks that fit in the first-level cache; between blocks the sums are stored and loaded again.
// Values and offsets are read once a run, front to back, so they are prefetched and cost bandwidth alone. The outputs of
// one channel lie far from those of the next, too far for the processor to foresee, so the sums of the channels that
// follow are prefetched, and in the first block what is added to them: ResNet-50 at .90 took .90 of the time, and single
// layers that add a residual .65 to .85 (Zen 3).
//
// Codes (weights.h) become values in registers, a vector of records at once, and each is broadcast from there: one load
// less for each record than with values in memory. Where channels have too few records to fill a vector, or four share
// their records, codes become values in memory before the first tile, if there are tiles enough to be worth it.
//
// Dense parts. From a density of 0.7 on it is quicker to multiply the zeros too: four output channels share one list of
// offsets, and each load of the input serves four multiply-adds.

#include <atomic>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "weights.h"

namespace dsr::DSR_LEVEL {

namespace {

// The operands that do not change within one op.
struct Product {
    const Op& op;
    const float *in, *residual;
    float* out;
    bool clipped, rectified;  // the two commonest activations are applied in registers
    Vec low, high;
    const float* values;    // weights that are floats, from index `start` on
    int64_t start = 0;
};

// The addresses of one tile, for channel 0: its output, and what is added to it.
struct Place {
    float* out;
    const float* residual;
    const float *bias, *scales;
    const int32_t* mask;
    int64_t out_step, residual_step;  // floats from one channel to the next

    Place(const Product& p, const Part& part, int64_t column)
        : out(p.out + (part.phase * p.op.out_stride + column) * LANES),
          residual(p.residual ? p.residual + (part.phase * p.op.other_stride + column) * LANES : nullptr),
          bias(p.op.spmm.bias),
          scales(p.op.spmm.scales),
          mask(p.op.mask ? p.op.mask + (part.phase * p.op.length + column) * LANES : nullptr),
          out_step(p.op.phases * p.op.out_stride * LANES),
          residual_step(p.op.phases * p.op.other_stride * LANES) {}

    // The sums of one channel start from its bias and residual in the first block, and from what they were later. Sums
    // that will be scaled start from zero.
    template <int T, bool SCALED>
    void start(Vec* sums, int64_t row, bool first) const {
        // Without the pragmas gcc keeps the arrays of sums in memory.
        if (!first) {
#pragma GCC unroll 16
            for (int t = 0; t < T; t++) sums[t] = load(out + row * out_step + t * LANES);
            return;
        }
        const Vec value = SCALED ? Vec{} : splat(bias[row]);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = value;
        if (!SCALED) add_residual<T>(sums, row);
    }

    // Sums of codes become sums of weights, after the last block.
    template <int T>
    void scale(Vec* sums, int64_t row) const {
        const Vec factor = splat(scales[row]), shift = splat(bias[row]);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = sums[t] * factor + shift;
        add_residual<T>(sums, row);
    }

    // Prefetches what `start` loads for a channel, and the lines that its results are stored to.
    template <int T>
    INLINE void fetch(int64_t row, bool first) const {
        using Lines = std::make_integer_sequence<int, (T * VECTOR_BYTES + LINE - 1) / LINE>;
        fetch_lines(out + row * out_step, Lines());
        if (first && residual) fetch_lines(residual + row * residual_step, Lines());
    }

   private:
    static constexpr int LINE = 64;  // bytes of a line of the cache

    // Without a loop: gcc takes one that does nothing but prefetch for one without effect, and removes it.
    template <int... I>
    INLINE static void fetch_lines(const float* from, std::integer_sequence<int, I...>) {
        (__builtin_prefetch((const char*)from + LINE * I), ...);
    }

    template <int T>
    void add_residual(Vec* sums, int64_t row) const {
        if (!residual) return;
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] += load(residual + row * residual_step + t * LANES);
    }
};

// The end of a channel: activation, zeros where there is no pixel, store.
template <int T>
inline void finish(const Product& p, Vec* sums, const int32_t* mask, float* out) {
    if (p.clipped) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = clip(sums[t], p.low, p.high);
    } else if (p.rectified) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) sums[t] = sums[t] < p.low ? p.low : sums[t];
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
    if (p.op.activation != CLIP) activate_masked(p.op, out, mask, T);
}

constexpr int AHEAD = 3;  // channels from one whose sums are computed to one whose sums are prefetched

template <int T, class Weights>
void sparse_tile(const Product& p, const Part& part, int64_t column) {
    const Spmm& op = p.op.spmm;
    const Place place(p, part, column);
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const bool first = b == part.first, last = b == part.last - 1;
        const char* in = (const char*)(p.in + (block.base + column) * LANES);
        const auto* value = Weights::of(op, p.values) + (block.values - p.start);
        const uint16_t* offset = op.offsets + block.offsets;
        // Addresses are computed two records ahead, also from one entry to the next: each waits for the load of its
        // offset, multiply-adds need not. Offsets are padded by two, so reading offset[2] is safe.
        const char* now = in + (uint64_t)offset[0] * VECTOR_BYTES;
        const char* next = in + (uint64_t)offset[1] * VECTOR_BYTES;
        const Entry* entry = op.entries + block.entries;
        for (const Entry* end = entry + block.count; entry != end; entry++) {
            Vec sums[T];
            if (end - entry > AHEAD) place.template fetch<T>(entry[AHEAD].row, first);
            place.template start<T, false>(sums, entry->row, first);
            // Weights are read once a run, so they come from far away.
            __builtin_prefetch(value + 512);
            __builtin_prefetch(offset + 1024);
            Weights::for_each(value, entry->count, place.scales, entry->row, [&](Vec weight) INLINE {
                const float* x = (const float*)now;
                now = next;
                next = in + (uint64_t)offset[2] * VECTOR_BYTES;
                offset++;
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) sums[t] += weight * load(x + t * LANES);
            });
            value += entry->count;
            float* out = place.out + entry->row * place.out_step;
            if (last) {
                finish<T>(p, sums, place.mask, out);
            } else {
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) store(out + t * LANES, sums[t]);
            }
        }
    }
}

template <int T, class Weights>
void dense_tile(const Product& p, const Part& part, int64_t column) {
    const Spmm& op = p.op.spmm;
    const Place place(p, part, column);
    for (int64_t b = part.first; b < part.last; b++) {
        const Block& block = op.blocks[b];
        const bool first = b == part.first, last = b == part.last - 1;
        const char* in = (const char*)(p.in + (block.base + column) * LANES);
        const uint16_t* offset = op.offsets + block.offsets;
        const auto* value = Weights::of(op, p.values) + (block.values - p.start);
        for (int64_t e = block.entries; e < block.entries + block.count; e++) {
            const Entry& entry = op.entries[e];
            Vec sums[4][T];
            int64_t row[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                // If fewer than four channels are left, the last one is computed again and stored over itself.
                row[r] = entry.row + r < p.op.channels ? entry.row + r : p.op.channels - 1;
                place.template start<T, Weights::SCALED>(sums[r], row[r], first);
            }
            if (e + 1 < block.entries + block.count) {
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) place.template fetch<T>(entry.row + 4 + r, first);
            }
            for (int k = 0; k < entry.count; k++) {
                const float* x = (const float*)(in + (uint64_t)offset[k] * VECTOR_BYTES);
                // Four channels one after the other, since with 16 registers the weights of all four would not fit.
                Vec inputs[T];
#pragma GCC unroll 16
                for (int t = 0; t < T; t++) inputs[t] = load(x + t * LANES);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    const Vec weight = splat(Weights::at(value + 4 * k + r));
#pragma GCC unroll 16
                    for (int t = 0; t < T; t++) sums[r][t] += weight * inputs[t];
                }
            }
            value += 4 * entry.count;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                float* out = place.out + row[r] * place.out_step;
                if (last) {
                    if (Weights::SCALED) place.template scale<T>(sums[r], row[r]);
                    finish<T>(p, sums[r], place.mask, out);
                } else {
#pragma GCC unroll 16
                    for (int t = 0; t < T; t++) store(out + t * LANES, sums[r][t]);
                }
            }
        }
    }
}

using Tile = void (*)(const Product&, const Part&, int64_t);

// The tile of each width from 1 on: the compiler asks for a width, and the last tiles of a plane may be narrower.
template <class Weights, int... T>
Tile sparse_of(std::integer_sequence<int, T...>, int width) {
    static constexpr Tile tiles[] = {sparse_tile<T + 1, Weights>...};
    return tiles[width - 1];
}

template <class Weights, int... T>
Tile dense_of(std::integer_sequence<int, T...>, int width) {
    static constexpr Tile tiles[] = {dense_tile<T + 1, Weights>...};
    return tiles[width - 1];
}

template <class Weights>
Tile tile_of(bool dense, int width) {
    return dense ? dense_of<Weights>(std::make_integer_sequence<int, WIDEST_DENSE>(), width)
                 : sparse_of<Weights>(std::make_integer_sequence<int, WIDEST>(), width);
}

struct Work {
    const Product& product;
    bool dense;
    int64_t tiles;   // of each part
    int64_t number;  // of this call of spmm in the process, from 1 on
    float* scratch;
};

// Item i is one tile of one part. Parts that differ by their phase alone follow each other and read the same input, so
// they take turns with each tile, while that input is in the cache.
void run_item(const void* context, int64_t item, int thread) {
    const Work& work = *(const Work*)context;
    const Op& op = work.product.op;
    const int64_t i = item / op.phases % work.tiles, group = item / (op.phases * work.tiles);
    const Part& part = op.spmm.parts[group * op.phases + item % op.phases];
    // Tiles of nearly equal width, the wider ones first: one narrow tile at the end would waste its broadcasts.
    const int64_t narrow = op.length / work.tiles, wider = op.length % work.tiles;
    const int width = (int)(narrow + (i < wider));
    const int64_t column = i * narrow + (i < wider ? i : wider);
    if (op.spmm.convert) {
        Product product = work.product;
        product.values = converted(op, work.number, group, scratch_of(work.scratch, thread));
        product.start = op.spmm.blocks[part.first].values;
        return tile_of<Floats>(work.dense, width)(product, part, column);
    }
    const Tile tile = op.spmm.codes ? tile_of<Codes>(work.dense, width) : tile_of<Floats>(work.dense, width);
    tile(work.product, part, column);
}

}  // namespace

void spmm(const Call& call) {
    const Op& op = call.op;
    // ReLU takes one instruction where a general clip takes two.
    const bool any = op.activation == CLIP, rectified = any && op.low == 0 && op.high == INFINITY;
    const bool clipped = any && !rectified && (op.low != -INFINITY || op.high != INFINITY);
    const Product product{op,      call.source, call.other,    call.out,       clipped,
                          rectified, splat(op.low), splat(op.high), op.spmm.values};
    const int64_t tile = op.spmm.tile;
    static std::atomic<int64_t> calls;
    const Work work{product, op.spmm.parts->dense != 0, (op.length + tile - 1) / tile, ++calls, call.scratch};
    parallel(call.pool, op.spmm.part_count * work.tiles, run_item, &work);
}

}  // namespace dsr::DSR_LEVEL
