// The choice between tiles of gather convolutions.
//
// A larger tile packs fewer pixels for each result, and a smaller one keeps more channels in the first-level cache, so
// that fewer sums are stored and loaded again. The best compromise depends on the plane, the channels and the density;
// an estimate of the cycles decides. Its constants were fitted to the times of tiles of nine layers of wide ResNets and
// ResNet-50 on Zen 5; the tile it picked was within 5 % of the best one in most of these layers, within 14 % in all.

#include "train_conv_tiles.h"

#include <stdlib.h>
#include <unistd.h>

namespace {

#if DSR_LANES == 16
// Cycles: a multiply-add; a record of a tile; a row of a tile; storing and loading a sum again, when it stays in the
// second-level cache, and more when it does not; packing a vector.
constexpr double FUSED = 0.6, RECORD = 0.56, ROW = 1, SUM = 2.24, FAR_SUM = 1.3, PACK = 3.6;
#else
constexpr double FUSED = 0.5, RECORD = 0.84, ROW = 0.64, SUM = 1.6, FAR_SUM = 0.5, PACK = 1.46;
#endif
constexpr double RUN = 33;       // finding the pixels of one channel in a source that no cache holds
constexpr double CROWDED = 1.1;  // slowdown by each fifth of the cache that the panel takes past four fifths

constexpr int64_t MOST_TILE_ROWS = 8, MOST_VECTORS = 48;

int64_t cache_bytes(int name, int64_t otherwise) {
    const long found = sysconf(name);
    return found >= 16384 ? found : otherwise;
}

}  // namespace

int64_t first_cache() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    return least(cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32768), 131072);
#else
    return 32768;
#endif
}

int64_t second_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    return cache_bytes(_SC_LEVEL2_CACHE_SIZE, 524288);
#else
    return 524288;
#endif
}

Taps::Taps(int64_t n, int64_t before, int64_t after, int64_t taps, int64_t step, int64_t dilation, bool gradient)
    : size(n),
      outputs((n + before + after - dilation * (taps - 1) - 1) / step + 1),
      stride(step),
      count(taps),
      low(INT64_MAX),
      offset((int64_t*)calloc(taps, sizeof(int64_t))),
      phase((int64_t*)calloc(taps, sizeof(int64_t))),
      live((bool*)calloc(taps, sizeof(bool))) {
    for (int64_t k = 0; k < taps; k++) offset[k] = k * dilation - before;
    if (gradient) {
        // Input pixel step * q + p meets tap k at output q + (p + before - k * dilation) / step, if that is whole.
        size = outputs;
        outputs = divide_up(n, step);
        stride = 1;
        for (int64_t k = 0; k < taps; k++) {
            phase[k] = (offset[k] % step + step) % step;
            offset[k] = (phase[k] - offset[k]) / step;
        }
    }
    for (int64_t k = 0; k < taps; k++) {
        const int64_t positions = gradient ? divide_up(n - phase[k], step) : outputs;
        const int64_t first = offset[k] < 0 ? divide_up(-offset[k], stride) : 0;
        live[k] = first < positions && first * stride + offset[k] < size;
        if (live[k] && offset[k] < low) low = offset[k];
    }
}

Taps::~Taps() {
    free(offset);
    free(phase);
    free(live);
}

int64_t Taps::slots(int64_t tile, int32_t* slot, int32_t* from) const {
    int64_t used = 0;
    for (int64_t k = 0; slot && k < count; k++) slot[k] = -1;
    for (int64_t residue = 0; residue < stride; residue++) {
        int64_t covered = 0;  // shifts below this one have slots
        for (int64_t shift = 0;; shift++) {
            int64_t found = INT64_MAX;  // the least shift of a tap from here on
            for (int64_t k = 0; k < count; k++) {
                const int64_t e = offset[k] - low;
                if (live[k] && e % stride == residue && e / stride >= shift && e / stride < found) found = e / stride;
            }
            if (found == INT64_MAX) break;
            shift = found;
            const int64_t begin = shift > covered ? shift : covered, end = shift + tile;
            for (int64_t s = begin; from && s < end; s++)
                from[used + s - begin] = (int32_t)(s * stride + residue + low);
            used += end - begin;
            covered = end;
            for (int64_t k = 0; slot && k < count; k++)
                if (live[k] && offset[k] - low == shift * stride + residue) slot[k] = (int32_t)(used - tile);
        }
    }
    return used;
}

void fewest_tiles(int64_t height, int64_t vectors, int widest, int& rows, int& columns) {
    int64_t fewest = INT64_MAX;
    for (int r = 1; r <= MOST_ROWS && r <= height; r++) {
        const int64_t across = divide_up(vectors, widest / r), tiles = across * divide_up(height, r);
        if (tiles >= fewest) continue;
        fewest = tiles;
        rows = r;
        columns = (int)divide_up(vectors, across);
    }
}

Choice Chooser::estimate(int64_t tile_y, int64_t tile_x) const {
    Choice choice{0, tile_y, tile_x, 1, 1};
    const int64_t vectors = divide_up(tile_x * pixel, LANES);
    fewest_tiles(tile_y, vectors, WIDEST_GATHER, choice.rows, choice.columns);
    const double slots = double(ty.slots(tile_y, nullptr, nullptr)) * tx.slots(reach(tile_x), nullptr, nullptr);
    const double bytes = slots * pixel * sizeof(float), outputs = double(vectors) * tile_y;
    const double tiles = double(divide_up(vectors, choice.columns)) * divide_up(tile_y, choice.rows);
    const int64_t held = bytes > 0 && budget / bytes < channels ? (int64_t)(budget / bytes) : channels;
    const int64_t blocks = divide_up(channels, held > 0 ? held : 1);
    const double share = bytes * divide_up(channels, blocks) / first_cache();
    const double crowded = share > 0.8 ? 1 + CROWDED * (share - 0.8) : 1;
    const double buffer = rows * outputs * VECTOR_BYTES / second_cache();
    const double sum = SUM + FAR_SUM * (buffer < 1 ? buffer : 1);
    const double row = records * (FUSED * crowded * outputs + RECORD * tiles) + blocks * ROW * tiles +
                       (blocks - 1) * sum * outputs;
    const double places = double(divide_up(ty.outputs, tile_y)) * divide_up(tx.outputs, tile_x);
    choice.cycles = places * (rows * row + channels * (PACK * bytes / VECTOR_BYTES + (far ? RUN : 0)));
    return choice;
}

Choice Chooser::best() const {
    Choice found{1e300, 1, 1, 1, 1};
    // Narrower tiles than a vector would waste lanes.
    const int64_t step = pixel < LANES ? LANES / pixel : 1;
    for (int64_t y = 1; y <= least(ty.outputs, MOST_TILE_ROWS); y++) {
        if (divide_up(ty.outputs, divide_up(ty.outputs, y)) != y) continue;  // a smaller one needs as many tiles
        int64_t last = 0;
        for (int64_t columns = 1; columns <= tx.outputs && columns * pixel <= MOST_VECTORS * LANES; columns++) {
            const int64_t even = divide_up(tx.outputs, divide_up(tx.outputs, columns));
            const int64_t x = least(divide_up(even, step) * step, tx.outputs);
            if (x == last) continue;
            last = x;
            const Choice choice = estimate(y, x);
            if (choice.cycles < found.cycles) found = choice;
        }
    }
    return found;
}
