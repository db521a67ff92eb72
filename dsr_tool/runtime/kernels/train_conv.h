// Gather convolutions: the one operation behind the forward pass and both gradients of sparse convolutions.
//
// The result of row r at position (y, x) of a grid is the sum over the records of r of
//
//     value * source[channel][stride * (y, x) + offset of the record's tap]
//
// where a record is one non-zero weight.
//
// - Forward: rows are output channels, source channels are input channels.
// - Gradient to the input: rows are pairs of an input channel and a phase, source channels are output channels. With
//   stride s, the input pixels s * q + p of one phase p meet the same taps, and q runs over the grid. All phases read
//   the same panel.
// - Gradient to the weights: the records of the forward pass, with sums over the grid instead of the records.
//
// An activation is (blocks, channels, height, width, lanes): as many images as there are lanes lie side by side. In a
// panel a *pixel* is `group` blocks times `lanes` floats: small planes take several blocks together, so that a row of
// pixels fills the registers.
#pragma once

#include <stdlib.h>

#include <atomic>

#include "kernels.h"

// These kernels are in the libraries of single levels alone, so they need no namespaces of their own.
using namespace dsr;
using namespace dsr::DSR_LEVEL;

// One direction of a gather convolution. A *slot* is a row of the panel, or a pixel of such a row.
struct Axis {
    int64_t size;     // source positions
    int64_t outputs;  // positions of the grid
    int64_t stride;   // source positions from one position of the grid to the next
    int64_t taps;     // taps of the kernel
    int64_t tile;     // positions of the grid that share a panel
    int64_t slots;    // slots of the panel
    int32_t* slot;    // (taps) slot of each tap for the first position of a tile; -1 if it never meets the source
    int32_t* from;    // (slots) source position of each slot, from stride * first position of the tile on
    int32_t* phase;   // (taps) phase of the result that each tap belongs to
};

// Source channels whose panel lies in the first-level cache together, and the rows that read them.
struct ChannelBlock {
    int32_t channel, channels;
    int32_t row, rows;
    int32_t first, last;  // whether the sums of the rows begin, and end, in this block
    int64_t record;       // index of the first record
    int64_t count;        // index of the first row's number of records
    int64_t sum;          // index of the first vector of sums, in the gradient to the weights
    int64_t value;        // canonical index of the first of its weights
};

struct ConvPlan {
    Axis y, x;
    int64_t lanes, group;
    int64_t channels, rows;            // of the source; of the result
    int64_t out_channels, out_height, out_width;  // of the result
    int64_t out_stride_y, out_stride_x;
    int64_t phases;                    // rows of each channel of the result
    int32_t *phase_y, *phase_x;        // (phases) first position of the result in each phase
    bool complete;                     // whether the phases cover the whole result
    bool direct;                       // whether tiles are stored to the result at once, else by way of a buffer
    int64_t shift;                     // log2 of the bytes of a pixel
    int64_t pitch;                     // floats of one row of the panel
    int64_t widest_rows, panel_floats;  // most rows, and most floats of a panel, of any block
    int tile_rows, tile_columns;       // register tile of the gather, in rows and vectors
    int weight_rows, weight_columns;   // register tile of the gradient to the weights
    int64_t records, nnz, sums;        // records; weights, with those of dead taps; vectors of sums
    ChannelBlock* blocks;
    int64_t block_count;
    uint16_t* counts;   // records of each row of each block
    uint16_t* offsets;  // pixels from the start of the panel to the input of each record
    // The canonical index of each record: from its block's first weight on where 16 bits suffice, else from 0 on. Both
    // are null if records are in canonical order within each row.
    uint16_t* near;
    int32_t* order;
    bool streams;       // whether panels are asked for while others are worked on
    int64_t bytes;      // of this plan
};

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t tiles_of(const Axis& axis) { return divide_up(axis.outputs, axis.tile); }

// The positions of one tile on an axis.
struct Span {
    int64_t first, count;
    Span(const Axis& axis, int64_t index)
        : first(index * axis.tile), count(least(axis.tile, axis.outputs - index * axis.tile)) {}
};

// One tile of the grid, for one group of blocks.
struct Place {
    int64_t group;
    Span y, x;
    Place(const ConvPlan& g, int64_t index)
        : group(index / (tiles_of(g.x) * tiles_of(g.y))),
          y(g.y, index / tiles_of(g.x) % tiles_of(g.y)),
          x(g.x, index % tiles_of(g.x)) {}
};

static inline int64_t places_of(const ConvPlan& g, int64_t blocks) {
    return divide_up(blocks, g.group) * tiles_of(g.y) * tiles_of(g.x);
}

// Vectors of one row of a tile; the last one may be partly outside.
static inline int64_t vectors_of(const ConvPlan& g, const Span& x) {
    return divide_up(x.count * g.group * g.lanes, LANES);
}

// Copies the source channels of a block to the panel; what lies outside of the source is zero.
void pack_panel(const ConvPlan& g, const ChannelBlock& block, const Place& place, const float* source, int64_t blocks,
                float* panel);

// Asks for the source of a panel, one row of pixels at a time, while another panel is worked on.
struct Stream {
    const float* channel;  // first pixel of the current channel
    const int32_t* from;   // source row of each row of the panel, from `y` on
    int64_t y, height, slots, plane, pitch;
    int64_t first, lines;  // floats of a row before those wanted; cache lines wanted
    int64_t slot, left;    // the row that is next; rows that are left
    int64_t at_once;       // rows of each call

    Stream() : left(0), at_once(0) {}

    // `calls` is the expected number of calls.
    Stream(const ConvPlan& g, const ChannelBlock& block, const Place& place, const float* source, int64_t calls);

    void ask() {
        if (!left) return;
        for (int64_t i = 0; i < at_once && left; i++, left--) {
            const int64_t row = y + from[slot];
            if (row >= 0 && row < height)
                for (int64_t line = 0; line < lines; line++)
                    __builtin_prefetch(channel + row * pitch + first + 16 * line, 0, 2);
            if (++slot == slots) slot = 0, channel += plane;
        }
    }
};

// The panel after that of block b of the place `item`: of the next block, or of the next place.
static inline Stream next_panel(const ConvPlan& g, const Place& place, int64_t item, int64_t b, const float* source,
                                int64_t places, int64_t first, int64_t last, int64_t calls) {
    if (b + 1 < last) return {g, g.blocks[b + 1], place, source, calls};
    if (item + 1 < places) return {g, g.blocks[first], Place(g, item + 1), source, calls};
    return {};
}

// The values of the records, from canonical order.
void gather_values(const ConvPlan& g, const float* canonical, float* ordered);

// Copies between a buffer of register tiles, (rows, tile rows, vectors), and an activation that has the rows as
// channels: to the activation, or from it with zeros where it ends.
struct Staging {
    const ConvPlan& g;
    const Place& place;
    int64_t blocks;
    int64_t row, rows;           // of the block of channels
    int64_t y, x;                // first position and first vector of the register tile, within the tile
    int64_t height, vectors;     // of the register tile
};
void unstage(const Staging& s, const float* buffer, float* out);
void stage(const Staging& s, const float* in, float* buffer);

// Hides from the compiler how an address came about. It would otherwise keep one register, or one spilled register, for
// each of the distances between the operands of a tile; so each line of a tile costs one addition.
static inline const char* opaque(const char* address) {
    asm("" : "+r"(address));
    return address;
}

// Records whose sums are reduced to one vector together; what remains of a row is cut into powers of two.
#if DSR_LANES == 16
constexpr int REDUCED = 8;
#else
constexpr int REDUCED = 4;
#endif

// Rows between the one that is computed and the one whose result, or gradient, is asked for. 2 to 3 were best on Zen 5.
constexpr int64_t AHEAD_ROWS = 2;

// Widest register tiles, in vectors, and most rows of one.
#if DSR_LANES == 16 || defined(__aarch64__)
constexpr int WIDEST_GATHER = 20, WIDEST_WEIGHTS = 16;  // of 32 registers
#else
constexpr int WIDEST_GATHER = 12, WIDEST_WEIGHTS = 10;  // of 16 registers
#endif
constexpr int MOST_ROWS = 4;

// Equal buffers for the threads of one call, at the alignment of cache lines. A thread takes any that is free.
struct Buffers {
    float* memory;
    int64_t floats;
    int count;
    std::atomic<bool>* taken;

    Buffers(Pool* pool, int64_t floats);
    ~Buffers();
    Buffers(const Buffers&) = delete;
    float* take();
    void give_back(float* buffer);
};

// Calls f(index of the first record, canonical index, count) for runs of records that are neighbours in both orders.
template <class F>
void each_run(const ConvPlan& g, F f) {
    if (g.near || g.order) {
        for (int64_t b = 0; b < g.block_count; b++) {
            const int64_t end = b + 1 < g.block_count ? g.blocks[b + 1].record : g.records;
            for (int64_t i = g.blocks[b].record; i < end; i++)
                f(i, g.near ? g.blocks[b].value + g.near[i] : (int64_t)g.order[i], (int64_t)1);
        }
        return;
    }
    // Rows are in canonical order, and so are the records of each row from block to block.
    int64_t* next = (int64_t*)calloc(g.rows + 1, sizeof(int64_t));
    for (int64_t b = 0; b < g.block_count; b++)
        for (int64_t i = 0; i < g.blocks[b].rows; i++) next[g.blocks[b].row + i + 1] += g.counts[g.blocks[b].count + i];
    for (int64_t row = 0; row < g.rows; row++) next[row + 1] += next[row];
    for (int64_t b = 0; b < g.block_count; b++) {
        const ChannelBlock& block = g.blocks[b];
        int64_t record = block.record;
        for (int64_t i = 0; i < block.rows; i++) {
            const int64_t count = g.counts[block.count + i];
            f(record, next[block.row + i], count);
            next[block.row + i] += count;
            record += count;
        }
    }
    free(next);
}

static inline int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Memory at the alignment of cache lines, for free(); null if there is none.
static inline float* new_floats(int64_t count) {
    return (float*)aligned_alloc(64, (size_t)whole_lines(count + 1) * sizeof(float));
}
