// The gradient to the weights of a sparse convolution: for each record, the sum over the grid and the images of the
// result's gradient times the input that the record reads.
//
// Panels and records are those of the forward pass. T vectors of one row's gradient stay in registers, each record has
// one sum of its own, and a few of these are reduced together by a tree of shuffles to one vector of partial sums,
// which is added to memory. The lanes of the partial sums are added up at the very end.
//
// The places of the grid are cut into a number of shares that depends on the plan alone, and the shares' sums are added
// in order, so the result has the same bits for any number of threads.

#include <utility>

#include "train_conv.h"

namespace {

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bits){__VA_ARGS__})
#endif

// Within each four lanes: (a0 + a2, a1 + a3, b0 + b2, b1 + b3), and (a0 + a1, a2 + a3, b0 + b1, b2 + b3).
#if DSR_LANES == 16
inline Vec add_halves(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
inline Vec add_pairs(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
// Quarters: (a0 + a1, a2 + a3, b0 + b1, b2 + b3).
inline Vec add_quarters(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif DSR_LANES == 8
inline Vec add_halves(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
inline Vec add_pairs(Vec a, Vec b) {
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
#else
inline Vec add_halves(Vec a, Vec b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
inline Vec add_pairs(Vec a, Vec b) { return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7); }
#endif

// Lane of the reduced vector -> which of its N records it is a part of.
template <int N>
inline int record_of(int lane) {
    if (N == 1) return 0;
    if (N == 2) return lane % 4 / 2;
    if (N == 4) return lane % 4;
    return lane % 4 + 4 * (lane >= LANES / 2);
}

template <int N>
inline Vec reduce(const Vec* a) {
    if constexpr (N == 1) return a[0];
    if constexpr (N == 2) return add_halves(a[0], a[1]);
    if constexpr (N == 4) return add_pairs(add_halves(a[0], a[1]), add_halves(a[2], a[3]));
#if DSR_LANES == 16
    if constexpr (N == 8) return add_quarters(reduce<4>(a), reduce<4>(a + 4));
#endif
}

struct WeightTile {
    const char* panel;
    int64_t pitch, shift;
    const uint16_t *counts, *offsets;
    int64_t rows;
    const float* gradient;  // of the result
    int64_t gradient_row, gradient_pitch;
    float* sums;
    int64_t ahead;  // floats from a row's gradient to the one to prefetch
    Stream* stream;
};

template <int R, int C, int N>
inline void add_records(const WeightTile& tile, const Vec (*gradient)[C], const uint16_t* offset, float* sums) {
    Vec total[N];
    const char* x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
        x[n] = tile.panel + ((uint64_t)offset[n] << tile.shift);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 20
        for (int c = 0; c < C; c++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                const Vec product = gradient[r][c] * load((const float*)x[n] + c * LANES);
                total[n] = r + c ? total[n] + product : product;
            }
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) x[n] = opaque(x[n] + tile.pitch);
    }
    store(sums, load(sums) + reduce<N>(total));
}

template <int R, int C>
void weight_tile(const WeightTile& tile) {
    const uint16_t* offset = tile.offsets;
    float* sums = tile.sums;
    const float* from = tile.gradient;
    for (int64_t row = 0; row < tile.rows; row++, from += tile.gradient_row) {
        const int count = tile.counts[row];
        tile.stream->ask();
        if (!count) continue;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 20
            for (int c = 0; c < C; c += 16 / LANES)
                __builtin_prefetch(from + tile.ahead + r * tile.gradient_pitch + c * LANES);
        Vec gradient[R][C];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 20
            for (int c = 0; c < C; c++) gradient[r][c] = load(from + r * tile.gradient_pitch + c * LANES);
        const uint16_t* end = offset + count;
        for (; end - offset >= REDUCED; offset += REDUCED, sums += LANES)
            add_records<R, C, REDUCED>(tile, gradient, offset, sums);
        if (REDUCED > 4 && count & 4) {
            add_records<R, C, 4>(tile, gradient, offset, sums);
            offset += 4;
            sums += LANES;
        }
        if (count & 2) {
            add_records<R, C, 2>(tile, gradient, offset, sums);
            offset += 2;
            sums += LANES;
        }
        if (count & 1) {
            add_records<R, C, 1>(tile, gradient, offset, sums);
            offset += 1;
            sums += LANES;
        }
    }
}

using Function = void (*)(const WeightTile&);

template <int R, int... C>
Function in_row(std::integer_sequence<int, C...>, int64_t columns) {
    static constexpr Function tiles[] = {weight_tile<R, C + 1>...};
    return tiles[columns - 1];
}

Function tile_of(int64_t rows, int64_t columns) {
    switch (rows) {
        case 1: return in_row<1>(std::make_integer_sequence<int, WIDEST_WEIGHTS>(), columns);
        case 2: return in_row<2>(std::make_integer_sequence<int, WIDEST_WEIGHTS / 2>(), columns);
        case 3: return in_row<3>(std::make_integer_sequence<int, WIDEST_WEIGHTS / 3>(), columns);
        default: return in_row<4>(std::make_integer_sequence<int, WIDEST_WEIGHTS / 4>(), columns);
    }
}

struct Weighing {
    const ConvPlan& g;
    const float *source, *gradient;
    float* staged;  // (places, floats of a place): the gradient in register tiles; null if the plan needs none
    float* sums;    // (shares, vectors of sums)
    int64_t blocks, shares, ranges, places;
    Buffers& buffers;
};

int64_t floats_of_place(const ConvPlan& g) {
    return g.rows * g.y.tile * divide_up(g.x.tile * g.group * g.lanes, LANES) * LANES;
}

// Calls f(y, x, height, vectors) for the register tiles of a place.
template <class F>
inline void each_tile(const ConvPlan& g, const Place& place, F f) {
    const int64_t vectors = vectors_of(g, place.x);
    for (int64_t y = 0; y < place.y.count; y += g.weight_rows)
        for (int64_t x = 0; x < vectors; x += g.weight_columns)
            f(y, x, least(g.weight_rows, place.y.count - y), least(g.weight_columns, vectors - x));
}

void stage_place(const void* context, int64_t item) {
    const Weighing& task = *(const Weighing*)context;
    const Place place(task.g, item);
    float* to = task.staged + item * floats_of_place(task.g);
    each_tile(task.g, place, [&](int64_t y, int64_t x, int64_t height, int64_t vectors) {
        stage({task.g, place, task.blocks, 0, task.g.rows, y, x, height, vectors}, task.gradient, to);
        to += task.g.rows * height * vectors * LANES;
    });
}

void weigh_block(const Weighing& task, const ChannelBlock& block, int64_t item, const Place& place, const float* panel,
                 float* sums, Stream& stream) {
    const ConvPlan& g = task.g;
    const int64_t row_floats = g.out_width * g.lanes, plane = g.out_height * row_floats;
    const float* staged = task.staged ? task.staged + item * floats_of_place(g) : nullptr;
    each_tile(g, place, [&](int64_t y, int64_t x, int64_t height, int64_t vectors) {
        const int64_t floats = height * vectors * LANES;
        WeightTile tile{(const char*)(panel + y * g.pitch + x * LANES), g.pitch * 4, g.shift, g.counts + block.count,
                        g.offsets + block.record, block.rows, nullptr, floats, vectors * LANES, sums, 0, &stream};
        if (staged) {
            tile.gradient = staged + block.row * floats;
            staged += g.rows * floats;
        } else {
            tile.gradient = task.gradient + (place.group * g.rows + block.row) * plane +
                            (place.y.first + y) * row_floats + place.x.first * g.lanes + x * LANES;
            tile.gradient_row = plane;
            tile.gradient_pitch = row_floats;
            tile.ahead = AHEAD_ROWS * plane;
        }
        tile_of(height, vectors)(tile);
    });
}

void weigh(const void* context, int64_t item) {
    const Weighing& task = *(const Weighing*)context;
    const ConvPlan& g = task.g;
    const int64_t share = item / task.ranges, range = item % task.ranges;
    const int64_t first = range * g.block_count / task.ranges, last = (range + 1) * g.block_count / task.ranges;
    const int64_t end = (share + 1) * task.places / task.shares;
    float* panel = task.buffers.take();
    float* sums = task.sums + share * g.sums * LANES;
    for (int64_t p = share * task.places / task.shares; p < end; p++) {
        const Place place(g, p);
        const int64_t across = divide_up(vectors_of(g, place.x), g.weight_columns);
        const int64_t tiles = divide_up(place.y.count, g.weight_rows) * across;
        for (int64_t b = first; b < last; b++) {
            const ChannelBlock& block = g.blocks[b];
            pack_panel(g, block, place, task.source, task.blocks, panel);
            Stream stream = next_panel(g, place, p, b, task.source, end, first, last, block.rows * tiles);
            weigh_block(task, block, p, place, panel, sums + block.sum * LANES, stream);
        }
    }
    task.buffers.give_back(panel);
}

// Adds up the lanes of the N records of one vector.
template <int N>
inline void fold(const float* sums, float* totals) {
    for (int n = 0; n < N; n++) totals[n] = 0;
    for (int lane = 0; lane < LANES; lane++) totals[record_of<N>(lane)] += sums[lane];
}

void fold_row(const float*& sums, int count, float* totals) {
    for (; count >= REDUCED; count -= REDUCED, sums += LANES, totals += REDUCED) fold<REDUCED>(sums, totals);
    if (count >= 4) fold<4>(sums, totals), count -= 4, sums += LANES, totals += 4;
    if (count >= 2) fold<2>(sums, totals), count -= 2, sums += LANES, totals += 2;
    if (count) fold<1>(sums, totals), sums += LANES;
}

// Totals of all records in their order, from the sums of all shares; the totals lie in the memory of the sums.
void fold_all(const Weighing& task) {
    const ConvPlan& g = task.g;
    const int64_t size = g.sums * LANES;
    for (int64_t s = 1; s < task.shares; s++)
        for (int64_t i = 0; i < size; i += LANES)
            store(task.sums + i, load(task.sums + i) + load(task.sums + s * size + i));
    // A vector holds at most as many records as it has lanes, so no total is written before its sums were read.
    const float* sums = task.sums;
    float* totals = task.sums;
    const ChannelBlock& end = g.blocks[g.block_count - 1];
    for (int64_t i = 0; i < end.count + end.rows; i++) {
        constexpr int MOST = 64;  // records at once
        float row[MOST];
        for (int count = g.counts[i]; count > 0; count -= MOST) {
            const int now = count < MOST ? count : MOST;
            fold_row(sums, now, row);
            for (int n = 0; n < now; n++) *totals++ = row[n];
        }
    }
}

}  // namespace

extern "C" {

// Computes the gradient to the weights in canonical order, `out` (nnz), by the plan of the forward pass; weights that
// never meet the input get zero. Returns 0, or -1 if there is no memory.
int dsr_conv_weights(const ConvPlan* plan, const float* source, int64_t blocks, const float* gradient, float* out,
                     Pool* pool) {
    const ConvPlan& g = *plan;
    const int64_t places = places_of(g, blocks);
    // Enough items for 16 threads; the sums of all shares together take 2 MiB, or those of one share if they are
    // larger.
    const int64_t shares = least(places, 524288 / ((g.sums + 1) * LANES));
    const int64_t count = shares > 16 ? 16 : shares > 1 ? shares : 1;
    const int64_t ranges = least(g.block_count, divide_up(16, count));
    Buffers buffers(pool, g.panel_floats + LANES);
    float* sums = new_floats((count * g.sums + 1) * LANES);
    float* staged = g.direct ? nullptr : new_floats(places * floats_of_place(g));
    if (!buffers.memory || !buffers.taken || !sums || (!g.direct && !staged)) {
        free(sums);
        free(staged);
        return -1;
    }
    std::memset(sums, 0, count * g.sums * LANES * sizeof(float));
    const Weighing task{g, source, gradient, staged, sums, blocks, count, ranges, places, buffers};
    if (staged) parallel(pool, places, stage_place, &task);
    parallel(pool, count * ranges, weigh, &task);
    free(staged);
    fold_all(task);
    if (g.records < g.nnz) std::memset(out, 0, g.nnz * sizeof(float));
    each_run(g, [=](int64_t record, int64_t index, int64_t n) {
        for (int64_t i = 0; i < n; i++) out[index + i] = sums[record + i];
    });
    free(sums);
    return 0;
}
}
