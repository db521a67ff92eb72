// The taps of one direction, and the choice between tiles.
#pragma once

#include "train_conv.h"

// One direction of a layer, before the tile is known.
struct Taps {
    int64_t size, outputs, stride, count;  // source positions; positions of the grid; source step; taps
    int64_t low;                           // least source offset of a live tap
    int64_t *offset, *phase;               // (count) source offset of each tap; phase of the result it belongs to
    bool* live;                            // (count) whether the tap ever meets the source

    Taps(int64_t size, int64_t before, int64_t after, int64_t taps, int64_t step, int64_t dilation, bool gradient);
    ~Taps();
    Taps(const Taps&) = delete;

    // Slots of a panel for `tile` positions. Slots of one residue of the stride follow each other, and gaps between
    // taps that are far apart get none. Fills `slot` (taps) and `from` (slots) unless they are null.
    int64_t slots(int64_t tile, int32_t* slot, int32_t* from) const;
};

// A tile of the grid, and the register tile that computes it.
struct Choice {
    double cycles;
    int64_t y, x;
    int rows, columns;
};

// Estimates the cycles of tiles, for one group of the convolution.
struct Chooser {
    const Taps &ty, &tx;
    int64_t pixel;           // floats of a pixel of the panel
    double records;          // mean number of records of a row, over all channels
    int64_t channels, rows;  // that belong together
    int64_t budget;          // largest panel, in bytes
    bool far;                // whether the source is larger than the second-level cache

    // Positions that the vectors of a row of `positions` cover.
    int64_t reach(int64_t positions) const {
        return divide_up(divide_up(positions * pixel, LANES) * LANES, pixel);
    }
    Choice estimate(int64_t tile_y, int64_t tile_x) const;
    Choice best() const;
};

// The register tile with the fewest tiles, of at most `widest` vectors, for a tile of `height` rows of `vectors`.
void fewest_tiles(int64_t height, int64_t vectors, int widest, int& rows, int& columns);

// Bytes of the data caches of a core.
int64_t first_cache();
int64_t second_cache();
