// Gather convolutions: the forward pass, and the gradient to the input.
//
// A thread takes one tile of the grid at a time. For each block of source channels it packs a panel that fits in the
// first-level cache, and lets the records of all rows pass over it: T vectors of one row's sums stay in registers, and
// each record costs one broadcast and T multiply-adds whose operands lie in the panel at a fixed distance. The sums of
// rows that more blocks add to wait in a buffer.

#include <utility>

#include "train_conv.h"

namespace {

struct GatherTile {
    const char* panel;
    int64_t pitch, shift;  // bytes from one row of the panel to the next; log2 of the bytes of a pixel
    const uint16_t *counts, *offsets;
    const float* values;
    int64_t rows;
    const float* bias;  // of the first row; null for zeros
    const float* from;  // sums so far; null in the first block
    float* to;
    int64_t from_row, from_pitch, to_row, to_pitch;  // floats
    int64_t ahead;  // floats from a row's result to the one to prefetch; 0 for none
    Stream* stream;
};

template <int R, int C>
void gather_tile(const GatherTile& tile) {
    const uint16_t* offset = tile.offsets;
    const float *value = tile.values, *from = tile.from;
    float* to = tile.to;
    for (int64_t row = 0; row < tile.rows; row++, to += tile.to_row) {
        Vec sums[R][C];
        if (from) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 20
                for (int c = 0; c < C; c++) sums[r][c] = load(from + r * tile.from_pitch + c * LANES);
            from += tile.from_row;
        } else {
            const Vec start = splat(tile.bias ? tile.bias[row] : 0.0f);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 20
                for (int c = 0; c < C; c++) sums[r][c] = start;
        }
        tile.stream->ask();
        if (tile.ahead) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 20
                for (int c = 0; c < C; c += 16 / LANES)
                    __builtin_prefetch(to + tile.ahead + r * tile.to_pitch + c * LANES, 1);
        }
        const int count = tile.counts[row];
        for (int k = 0; k < count; k++) {
            const Vec weight = splat(value[k]);
            const char* line = tile.panel + ((uint64_t)offset[k] << tile.shift);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++, line = opaque(line + tile.pitch))
#pragma GCC unroll 20
                for (int c = 0; c < C; c++) sums[r][c] += weight * load((const float*)line + c * LANES);
        }
        offset += count;
        value += count;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 20
            for (int c = 0; c < C; c++) store(to + r * tile.to_pitch + c * LANES, sums[r][c]);
    }
}

using Function = void (*)(const GatherTile&);

template <int R, int... C>
Function in_row(std::integer_sequence<int, C...>, int64_t columns) {
    static constexpr Function tiles[] = {gather_tile<R, C + 1>...};
    return tiles[columns - 1];
}

Function tile_of(int64_t rows, int64_t columns) {
    switch (rows) {
        case 1: return in_row<1>(std::make_integer_sequence<int, WIDEST_GATHER>(), columns);
        case 2: return in_row<2>(std::make_integer_sequence<int, WIDEST_GATHER / 2>(), columns);
        case 3: return in_row<3>(std::make_integer_sequence<int, WIDEST_GATHER / 3>(), columns);
        default: return in_row<4>(std::make_integer_sequence<int, WIDEST_GATHER / 4>(), columns);
    }
}

struct Gathering {
    const ConvPlan& g;
    const float *source, *values, *bias;
    float* out;
    int64_t blocks, parts;  // parts: shares of the rows of each block, for grids with few places
    Buffers& buffers;
};

// The rows of a block that one item computes, and their records.
struct Rows {
    int64_t first, count, record;
    Rows(const ConvPlan& g, const ChannelBlock& block, int64_t part, int64_t parts)
        : first(block.rows * part / parts), count(block.rows * (part + 1) / parts - first), record(block.record) {
        for (int64_t i = 0; i < first; i++) record += g.counts[block.count + i];
    }
};

// All register tiles of one block of channels.
void gather_block(const Gathering& task, const ChannelBlock& block, const Rows& rows, const Place& place,
                  const float* panel, float* sums, Stream& stream) {
    const ConvPlan& g = task.g;
    const int64_t row_floats = g.out_width * g.lanes, plane = g.out_height * row_floats;
    const int64_t vectors = vectors_of(g, place.x), row = block.row + rows.first;
    for (int64_t y = 0; y < place.y.count; y += g.tile_rows) {
        const int64_t height = least(g.tile_rows, place.y.count - y);
        for (int64_t x = 0; x < vectors; x += g.tile_columns) {
            const int64_t width = least(g.tile_columns, vectors - x), floats = height * width * LANES;
            const bool stored = block.last && g.direct;
            GatherTile tile{(const char*)(panel + y * g.pitch + x * LANES), g.pitch * 4, g.shift,
                            g.counts + block.count + rows.first, g.offsets + rows.record, task.values + rows.record,
                            rows.count, task.bias ? task.bias + row : nullptr, block.first ? nullptr : sums,
                            sums, floats, width * LANES, floats, width * LANES, 0, &stream};
            if (stored) {
                tile.to = task.out + (place.group * g.rows + row) * plane + (place.y.first + y) * row_floats +
                          place.x.first * g.lanes + x * LANES;
                tile.to_row = plane;
                tile.to_pitch = row_floats;
                tile.ahead = AHEAD_ROWS * plane;
            }
            tile_of(height, width)(tile);
            if (block.last && !stored)
                unstage({g, place, task.blocks, row, rows.count, y, x, height, width}, sums, task.out);
            sums += g.widest_rows * floats;
        }
    }
}

void gather_place(const void* context, int64_t item) {
    const Gathering& task = *(const Gathering*)context;
    const ConvPlan& g = task.g;
    const int64_t at = item / task.parts, places = places_of(g, task.blocks);
    const Place place(g, at);
    const int64_t tiles = divide_up(place.y.count, g.tile_rows) * divide_up(vectors_of(g, place.x), g.tile_columns);
    float* panel = task.buffers.take();
    float* sums = panel + whole_lines(g.panel_floats + LANES);
    for (int64_t b = 0; b < g.block_count; b++) {
        const ChannelBlock& block = g.blocks[b];
        const Rows rows(g, block, item % task.parts, task.parts);
        pack_panel(g, block, place, task.source, task.blocks, panel);
        Stream stream = next_panel(g, place, at, b, task.source, places, 0, g.block_count, rows.count * tiles + 1);
        gather_block(task, block, rows, place, panel, sums, stream);
    }
    task.buffers.give_back(panel);
}

int64_t sum_floats(const ConvPlan& g) {
    return g.widest_rows * g.y.tile * divide_up(g.x.tile * g.group * g.lanes, LANES) * LANES;
}

}  // namespace

extern "C" {

// Computes `out`, all blocks of the result, from `source` and the values in canonical order; `bias` may be null.
// Returns 0, or -1 if there is no memory.
int dsr_conv(const ConvPlan* plan, const float* source, int64_t blocks, const float* values, const float* bias,
             float* out, Pool* pool) {
    const ConvPlan& g = *plan;
    Buffers buffers(pool, whole_lines(g.panel_floats + LANES) + sum_floats(g));
    float* ordered = new_floats(g.records);
    if (!buffers.memory || !buffers.taken || !ordered) {
        free(ordered);
        return -1;
    }
    if (!g.complete)
        std::memset(out, 0, blocks * g.out_channels * g.out_height * g.out_width * g.lanes * sizeof(float));
    gather_values(g, values, ordered);
    // The parts change which thread computes a row, and no sum.
    const int64_t places = places_of(g, blocks), wanted = divide_up(4 * (threads_of(pool) - 1), places);
    const int64_t most = divide_up(g.widest_rows, 16), parts = wanted < 1 ? 1 : least(wanted, most > 1 ? most : 1);
    const Gathering task{g, source, ordered, bias, out, blocks, parts, buffers};
    if (g.phases) parallel(pool, places * parts, gather_place, &task);
    free(ordered);
    return 0;
}
}
