// Fills the arrays of a packed weight, in one pass over its entries to count them and one to move them.

#include <cstring>

#include "pack.h"
#include "pack_cuts.h"

namespace dsr {

namespace {

constexpr int64_t AHEAD = 6;  // runs from a prefetch to its use

// Ranks the channels of a block by their number of records, most first. Stable, so that the order of sums, and with it
// every bit of the result, depends on the mask alone.
void rank(const Run* runs, int64_t rows, int64_t first_row, int32_t* places, Entry* entries) {
    int32_t longest = 0, place = 0;
    for (int64_t i = 0; i < rows; i++) longest = runs[i].count > longest ? runs[i].count : longest;
    memset(places, 0, size_t(longest + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < rows; i++) places[runs[i].count]++;
    for (int32_t count = longest; count >= 0; count--) {
        const int32_t number = places[count];
        places[count] = place;
        place += number;
    }
    for (int64_t i = 0; i < rows; i++) entries[places[runs[i].count]++] = {int32_t(first_row + i), runs[i].count};
}

// Fills for each list of offsets the offset of every entry of a block; no record needs a division then.
void fill_tables(const Recipe& r, const Phase* phases, int64_t extent, uint16_t* tables) {
    for (int64_t phase = 0, next = 0; phase < r.phases; phase++) {
        if (phases[phase].list < next) continue;
        uint16_t* table = tables + next++ * extent;
        for (int64_t channel = 0, i = 0; i < extent; channel++)
            for (int64_t tap = 0; tap < r.kernel; tap++, i++)
                table[i] = uint16_t(channel * r.channel + taps_of(r, phase)[tap] - phases[phase].lowest);
    }
}

template <class Entries>
struct SparseFill {
    const Recipe& r;
    const Weight& w;
    const Packed& out;
    const Entries& entries;
    const Cuts& cuts;
    const Phase* phases;
    int64_t list_count;
    const uint16_t* tables;  // (list_count, extent)
    Run* runs;               // (blocks, channels of the part)
    int32_t* places;         // one for each number of records
    int64_t done = 0;        // records of the parts before
    int64_t entry = 0, part = 0, block = 0;

    // Finds the runs of a part's channels. Returns the number of their records.
    int64_t find_runs(int64_t low, int64_t high) {
        const int64_t size = r.inner * r.kernel, step = cuts.groups > 1 ? size : cuts.extent;
        int64_t next = done;
        for (int64_t row = low; row < high; row++)
            for (int64_t b = 0; b < cuts.blocks; b++) {
                const int64_t to = smaller((b + 1) * step, size);
                const int64_t count = entries.count(row * size + b * step, row * size + to, next);
                runs[b * (high - low) + row - low] = {int32_t(next), int32_t(count)};
                next += count;
            }
        return next - done;
    }

    // Moves one run: its values, and its offsets of each list. Returns false where the entries are not those counted.
    bool move(const Run& run, int64_t from, int64_t table, int64_t extent, int64_t value, int64_t offset,
              int64_t records) {
        if (run.count == 0) return true;
        const char* source = (const char*)w.values + run.first * w.width;
        memcpy((char*)out.values + value * w.width, source, size_t(run.count * w.width));
        for (int64_t list = 0; list < list_count; list++) {
            const uint16_t* own = tables + list * cuts.extent + table;
            uint16_t* target = out.offsets + offset + list * records;
            const auto look_up = [=](int64_t i, int64_t position) { target[i] = own[position]; };
            if (!entries.each(from, run.first, run.count, extent, look_up)) return false;
        }
        return true;
    }

    // Adds the part of output channels [low, high) in all phases.
    bool add(int64_t low, int64_t high, int64_t first_channel) {
        const int64_t rows = high - low, size = r.inner * r.kernel, records = find_runs(low, high);
        const int64_t offsets = list_count * done;
        int64_t moved = 0;
        for (int64_t b = 0; b < cuts.blocks; b++) {
            const Run* own = runs + b * rows;
            for (int64_t phase = 0; phase < r.phases; phase++) {
                const int64_t base = (first_channel + b * r.per_block) * r.channel + phases[phase].lowest;
                out.blocks[block + phase * cuts.blocks + b] = {
                    base, done + moved, offsets + phases[phase].list * records + moved, entry, rows};
            }
            Entry* ranked = out.entries + entry;
            rank(own, rows, low, places, ranked);
            for (int64_t i = 0; i < rows; i++) {
                const int64_t row = ranked[i].row;
                // Runs lie in any order, so most begin where no cache has been.
                const Run& later = own[ranked[smaller(i + AHEAD, rows - 1)].row - low];
                for (int64_t byte = 0; byte < later.count * w.width; byte += 64)
                    __builtin_prefetch((const char*)w.values + later.first * w.width + byte);
                // The groups of a part lie one after the other in its only block.
                const int64_t table = cuts.groups > 1 ? (row - low) / (r.rows / r.groups) * size : 0;
                const int64_t from = b * cuts.extent, left = smaller(size - from, cuts.extent);
                const Run& run = own[row - low];
                if (!move(run, row * size + from, table, left, done + moved, offsets + moved, records)) return false;
                moved += run.count;
            }
            entry += rows;
        }
        for (int64_t phase = 0; phase < r.phases; phase++, block += cuts.blocks)
            out.parts[part++] = {block, block + cuts.blocks, phase, 0};
        done += records;
        return true;
    }
};

template <class Entries>
Fault fill_sparse(const Recipe& r, const Weight& w, const Sizes& s, const Packed& out, const Entries& entries) {
    const Cuts cuts = cuts_of(r);
    Scratch<int64_t> bounds(r.split);
    Scratch<Phase> phases(r.phases);
    if (!bounds.data || !phases.data) return Fault::MEMORY;
    const int64_t count = number_lists(r, phases.data);
    Scratch<uint16_t> tables(count * cuts.extent);
    Scratch<Run> runs(s.entries);
    Scratch<int32_t> places(smaller(cuts.extent, w.active) + 1);
    if (!tables.data || !runs.data || !places.data) return Fault::MEMORY;
    fill_tables(r, phases.data, cuts.extent, tables.data);
    SparseFill<Entries> sparse{r, w, out, entries, cuts, phases.data, count, tables.data, runs.data, places.data};
    const int64_t parts = r.groups == 1 ? split_rows(r, w, bounds.data) : cuts.parts;
    if (parts * r.phases != s.parts) return Fault::POSITIONS;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t group = part * cuts.groups, end = smaller(group + cuts.groups, r.groups), own = r.rows / r.groups;
        const bool done = r.groups == 1 ? sparse.add(bounds.data[part], bounds.data[part + 1], 0)
                                        : sparse.add(group * own, end * own, group * r.inner);
        if (!done) return Fault::POSITIONS;
    }
    return sparse.done == w.active ? Fault::NONE : Fault::POSITIONS;
}

// Writes the entries of each output channel where `place` says: (channel, input channel of a block's start, channels of
// the block) to the index of its first value; further ones follow at `step`.
template <class Value, class Entries, class Place>
bool scatter(const Recipe& r, const Weight& w, const Entries& entries, int64_t per_block, Value* out, int64_t step,
             Place place) {
    const int64_t size = r.inner * r.kernel;
    int64_t next = 0;
    for (int64_t row = 0; row < r.rows; row++)
        for (int64_t low = 0; low < r.inner; low += per_block) {
            const int64_t channels = smaller(per_block, r.inner - low), from = row * size + low * r.kernel;
            const int64_t extent = channels * r.kernel, count = entries.count(from, from + extent, next);
            Value* target = out + place(row, low, channels);
            // The values of a plan file lie wherever its reader has put the file.
            const char* source = (const char*)w.values + next * sizeof(Value);
            const auto write = [=](int64_t i, int64_t position) {
                memcpy(target + position * step, source + i * sizeof(Value), sizeof(Value));
            };
            if (!entries.each(from, next, count, extent, write)) return false;
            next += count;
        }
    return next == w.active;
}

template <class Value, class Entries>
Fault fill_dense(const Recipe& r, const Weight& w, const Packed& out, const Entries& entries) {
    const int64_t quads = divided_up(r.rows, 4), per_block = smaller(r.per_block, r.inner);
    const int64_t blocks = divided_up(r.inner, per_block), size = r.inner * r.kernel;
    Scratch<int64_t> lowest(r.phases);
    if (!lowest.data) return Fault::MEMORY;
    Value* values = (Value*)out.values;
    memset(values, 0, size_t(4 * quads * size) * sizeof(Value));
    const auto first_of = [=](int64_t low, int64_t quad, int64_t channels) {
        return 4 * r.kernel * (quads * low + quad * channels);
    };
    // Four values for each offset lie together, as the kernel broadcasts them together.
    const auto place = [=](int64_t row, int64_t low, int64_t channels) {
        return first_of(low, row / 4, channels) + row % 4;
    };
    if (!scatter(r, w, entries, per_block, values, 4, place)) return Fault::POSITIONS;
    for (int64_t low = 0, entry = 0; low < r.inner; low += per_block) {
        const int64_t channels = smaller(per_block, r.inner - low), count = channels * r.kernel;
        // The kernel computes the last channel as often as it takes to make four.
        const int last = int((r.rows - 1) % 4);
        Value* quad = values + first_of(low, quads - 1, channels);
        for (int lane = last + 1; lane < 4; lane++)
            for (int64_t i = 0; i < count; i++) quad[4 * i + lane] = quad[4 * i + last];
        for (int64_t i = 0; i < quads; i++) out.entries[entry++] = {int32_t(4 * i), int32_t(count)};
    }
    uint16_t* offset = out.offsets;
    for (int64_t phase = 0; phase < r.phases; phase++) {
        lowest.data[phase] = lowest_tap(r, phase);
        for (int64_t channel = 0; channel < per_block; channel++)
            for (int64_t tap = 0; tap < r.kernel; tap++)
                *offset++ = uint16_t(channel * r.channel + taps_of(r, phase)[tap] - lowest.data[phase]);
    }
    for (int64_t share = 0, part = 0, block = 0; share < r.split; share++) {
        const int64_t low = quads * share / r.split, high = quads * (share + 1) / r.split;
        for (int64_t phase = 0; phase < r.phases && low < high; phase++, block += blocks) {
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t channel = b * per_block, channels = smaller(per_block, r.inner - channel);
                out.blocks[block + b] = {channel * r.channel + lowest.data[phase], first_of(channel, low, channels),
                                         phase * per_block * r.kernel, b * quads + low, high - low};
            }
            out.parts[part++] = {block, block + blocks, phase, 1};
        }
    }
    return Fault::NONE;
}

// All weights as one block, where a channel is one entry.
template <class Value, class Entries>
Fault fill_rows(const Recipe& r, const Weight& w, const Packed& out, const Entries& entries) {
    const int64_t size = r.inner * r.kernel;
    for (int64_t row = 0; row < r.rows; row++) out.entries[row] = {int32_t(row), int32_t(size)};
    out.blocks[0] = {0, 0, 0, 0, r.rows};
    out.parts[0] = {0, 1, 0, 1};
    if (out.values == w.values && w.active == w.size) return Fault::NONE;
    memset(out.values, 0, size_t(w.size) * sizeof(Value));
    const auto place = [=](int64_t row, int64_t, int64_t) { return row * size; };
    return scatter(r, w, entries, r.inner, (Value*)out.values, 1, place) ? Fault::NONE : Fault::POSITIONS;
}

template <class Value, class Entries>
Fault fill_with_zeros(const Recipe& r, const Weight& w, const Packed& out, const Entries& entries) {
    return packs_as(r, Packing::DENSE) ? fill_dense<Value>(r, w, out, entries) : fill_rows<Value>(r, w, out, entries);
}

}  // namespace

Fault fill(const Recipe& recipe, const Weight& weight, const Sizes& sizes, const Packed& packed) {
    Sizes own;
    const Fault fault = sizes_of(recipe, weight, own);
    if (fault != Fault::NONE) return fault;
    if (memcmp(&own, &sizes, sizeof(Sizes))) return Fault::SIZES;
    if (!packs_as(recipe, Packing::ROWS)) {
        // Kernels convert whole vectors of codes, and read offsets past the last record.
        if (weight.width == 1) memset((int8_t*)packed.values + sizes.values - SPARE_CODES, 0, SPARE_CODES);
        for (int64_t i = 1; i <= SPARE_OFFSETS; i++) packed.offsets[sizes.offsets - i] = 0;
    }
    return with_entries(weight, [&](const auto& entries) {
        if (packs_as(recipe, Packing::SPARSE)) return fill_sparse(recipe, weight, sizes, packed, entries);
        return weight.width == 1 ? fill_with_zeros<int8_t>(recipe, weight, packed, entries)
                                 : fill_with_zeros<uint32_t>(recipe, weight, packed, entries);
    });
}

}  // namespace dsr
