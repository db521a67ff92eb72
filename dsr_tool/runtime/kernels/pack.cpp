// Measures how a weight is packed, and chooses the shares of threads.

#include "pack.h"

#include <initializer_list>

#include "pack_cuts.h"

namespace dsr {

namespace {

constexpr int64_t MAX_SIZE = INT32_MAX;  // entries of a weight, zeros included: rows and counts are int32
constexpr int64_t MAX_PHASES = 256;      // of the largest factor, 16 each way; each is compared with all others
constexpr int64_t MAX_SPLIT = 1 << 16;

// Fewest vectors of a tile that is narrowed to give each thread the same number of tiles.
constexpr int64_t MIN_SHARED_TILE = 5;
// Tiles per thread from which an uneven number of them is shared well enough as it is.
constexpr int64_t MANY_TILES = 4;

bool numbers_fit(const Recipe& r, const Weight& w) {
    for (const int64_t number : {r.rows, r.inner, r.kernel, r.groups, r.phases, r.channel, r.per_block, r.split})
        if (number < 1) return false;
    int64_t size, taps, channels;
    if (__builtin_mul_overflow(r.rows, r.inner, &size) || __builtin_mul_overflow(size, r.kernel, &size)) return false;
    if (size > MAX_SIZE || size != w.size || r.rows % r.groups) return false;
    if (r.phases > MAX_PHASES || r.split > MAX_SPLIT || !r.offsets) return false;
    if (__builtin_mul_overflow(r.phases, r.kernel, &taps) || taps != r.taps) return false;
    // As many input channels as entries at most, so the first product is small.
    if (__builtin_mul_overflow(r.inner * r.groups, r.channel, &channels) || channels > INT64_MAX / 4) return false;
    if (w.active < 0 || w.active > size || (w.active && !w.values) || (w.width != 1 && w.width != 4)) return false;
    if (w.bits ? w.positions != nullptr : !w.positions && w.active && w.active != size) return false;
    const bool dense = packs_as(r, Packing::DENSE) || packs_as(r, Packing::ROWS);
    return packs_as(r, Packing::SPARSE) || (dense && r.groups == 1);
}

bool positions_ascend(const Weight& w) {
    if (w.bits) {
        const EntryBits entries(w);
        const int padding = -w.size & 7;
        return entries.count_all(0, w.size) == w.active && !(w.bits[(w.size - 1) >> 3] & ((1 << padding) - 1));
    }
    if (!w.positions || !w.active) return true;
    bool ascend = w.positions[0] >= 0 && w.positions[w.active - 1] < w.size;
    for (int64_t k = 1; k < w.active; k++) ascend &= w.positions[k - 1] < w.positions[k];
    return ascend;
}

// Sets the inputs that are read, and the largest offset within a block. Returns false where that is too large.
bool reach_fits(const Recipe& r, Sizes& s) {
    // Four dense channels read no input past the last one; a sparse block's offsets are taken modulo its channels.
    const int64_t per_block = packs_as(r, Packing::DENSE) ? smaller(r.per_block, r.inner) : r.per_block;
    int64_t widest = 0, block;
    s.lowest = INT64_MAX, s.highest = INT64_MIN;
    for (int64_t phase = 0; phase < r.phases; phase++) {
        const int64_t low = lowest_tap(r, phase);
        int64_t high = low;
        for (int64_t i = 0; i < r.kernel; i++) high = taps_of(r, phase)[i] > high ? taps_of(r, phase)[i] : high;
        widest = high - low > widest ? high - low : widest;
        s.lowest = low < s.lowest ? low : s.lowest;
        s.highest = high > s.highest ? high : s.highest;
    }
    s.highest += (r.inner * r.groups - 1) * r.channel;
    if (__builtin_mul_overflow(per_block - 1, r.channel, &block) || __builtin_add_overflow(block, widest, &s.reach))
        s.reach = INT64_MAX;
    return s.reach <= MAX_OFFSET;
}

bool differ_by_shift(const Recipe& r, int64_t a, int64_t b) {
    const int64_t shift = int64_t(taps_of(r, a)[0]) - taps_of(r, b)[0];
    for (int64_t i = 1; i < r.kernel; i++)
        if (int64_t(taps_of(r, a)[i]) - taps_of(r, b)[i] != shift) return false;
    return true;
}

}  // namespace

Cuts cuts_of(const Recipe& r) {
    if (r.groups == 1) return {1, 1, divided_up(r.inner, r.per_block), smaller(r.per_block, r.inner) * r.kernel};
    // As many groups as fill a block.
    const int64_t fill = r.per_block / r.inner, groups = fill < 1 ? 1 : smaller(fill, r.groups);
    const int64_t channels = r.inner * groups;
    return {divided_up(r.groups, groups), groups, divided_up(channels, r.per_block),
            smaller(r.per_block, channels) * r.kernel};
}

int64_t number_lists(const Recipe& r, Phase* phases) {
    int64_t count = 0;
    for (int64_t phase = 0; phase < r.phases; phase++) {
        phases[phase] = {count, lowest_tap(r, phase)};
        for (int64_t other = 0; other < phase && phases[phase].list == count; other++)
            if (differ_by_shift(r, phase, other)) phases[phase].list = phases[other].list;
        count += phases[phase].list == count;
    }
    return count;
}

int64_t split_rows(const Recipe& r, const Weight& w, int64_t* bounds) {
    const int64_t size = r.inner * r.kernel;
    int64_t parts = 0, share = 1;
    bounds[0] = 0;
    // One more for each channel, since one without records costs a load and a store too.
    with_entries(w, [&](const auto& entries) {
        for (int64_t row = 0, first = 0; row < r.rows && share < r.split; row++) {
            first += entries.count(row * size, (row + 1) * size, first);
            for (; share < r.split && (first + row + 1) * r.split >= (w.active + r.rows) * share; share++)
                if (row > bounds[parts]) bounds[++parts] = row;
        }
    });
    bounds[++parts] = r.rows;
    return parts;
}

Fault sizes_of(const Recipe& r, const Weight& w, Sizes& s) {
    s = {};
    if (!numbers_fit(r, w)) return Fault::SIZES;
    if (packs_as(r, Packing::ROWS)) {
        s.values = w.size, s.entries = r.rows, s.blocks = 1, s.parts = 1;
        s.highest = r.inner * r.kernel - 1;
        return Fault::NONE;
    }
    if (!reach_fits(r, s)) return Fault::REACH;
    int64_t blocks;
    if (packs_as(r, Packing::DENSE)) {
        const int64_t quads = divided_up(r.rows, 4), per_block = smaller(r.per_block, r.inner);
        // The kernel counts the four values of each record in 32 bits.
        if (per_block * r.kernel > INT32_MAX / 4) return Fault::SIZES;
        blocks = divided_up(r.inner, per_block);
        s.values = with_spare(4 * quads * r.inner * r.kernel, w);
        s.offsets = r.phases * per_block * r.kernel + SPARE_OFFSETS;
        s.entries = quads * blocks;
        s.parts = smaller(r.split, quads);
    } else {
        const Cuts cuts = cuts_of(r);
        Scratch<int64_t> bounds(r.split);
        Scratch<Phase> phases(r.phases);
        if (!bounds.data || !phases.data) return Fault::MEMORY;
        const int64_t count = number_lists(r, phases.data);
        blocks = cuts.blocks;
        s.values = with_spare(w.active, w);
        s.offsets = count * w.active + SPARE_OFFSETS;
        s.entries = r.rows * blocks;
        s.parts = r.groups == 1 ? split_rows(r, w, bounds.data) : cuts.parts;
        s.scratch = s.entries * int64_t(sizeof(Run)) + 2 * count * cuts.extent + 4 * smaller(cuts.extent, w.active);
    }
    s.parts *= r.phases;
    s.blocks = s.parts * blocks;
    return Fault::NONE;
}

Fault measure(const Recipe& recipe, const Weight& weight, Sizes& sizes) {
    const Fault fault = sizes_of(recipe, weight, sizes);
    if (fault != Fault::NONE) return fault;
    return positions_ascend(weight) ? Fault::NONE : Fault::POSITIONS;
}

Share share(int64_t threads, int64_t length, int64_t tile, int64_t phases) {
    // The product of two of them fits then.
    for (const int64_t number : {threads, length, tile, phases})
        if (number < 1 || number > INT32_MAX) return {tile, 1};
    const int64_t tiles = divided_up(length, tile) * phases;
    if (tiles % threads == 0) return {tile, 1};
    const int64_t narrow = divided_up(length * phases, divided_up(tiles, threads) * threads);
    // Narrower tiles cost broadcasts, so they are taken only if they stay wide enough.
    if (tiles > threads && narrow >= MIN_SHARED_TILE) return {narrow, 1};
    return {tile, tiles >= MANY_TILES * threads ? 1 : threads};
}

}  // namespace dsr
