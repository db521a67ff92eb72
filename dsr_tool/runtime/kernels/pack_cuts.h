// How a recipe cuts a weight, for the functions that measure and fill.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "ops.h"
#include "pack_entries.h"

namespace dsr {

// Memory that is freed at the end of its scope; null where there is none.
template <class T>
struct Scratch {
    T* const data;

    explicit Scratch(int64_t count) : data((T*)malloc((size_t(count) + 1) * sizeof(T))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(data); }
};

// Records of one output channel in one block, as they lie in the weight.
struct Run {
    int32_t first, count;
};

// The parts of a sparse weight in each phase.
struct Cuts {
    int64_t parts;
    int64_t groups;  // of channels in a part
    int64_t blocks;  // of a part
    int64_t extent;  // entries of an output channel in a block, zeros included; of all groups of the part
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divided_up(int64_t a, int64_t b) { return a / b + (a % b > 0); }

inline bool packs_as(const Recipe& r, Packing packing) { return r.packing == int64_t(packing); }

// Offsets of the kernel entries in one phase.
inline const int32_t* taps_of(const Recipe& r, int64_t phase) { return r.offsets + phase * r.kernel; }

// A phase of the output.
struct Phase {
    int64_t list;    // number of its list of offsets
    int64_t lowest;  // its smallest offset
};

// The smallest offset of a phase.
inline int64_t lowest_tap(const Recipe& r, int64_t phase) {
    int32_t low = taps_of(r, phase)[0];
    for (int64_t i = 1; i < r.kernel; i++) low = taps_of(r, phase)[i] < low ? taps_of(r, phase)[i] : low;
    return low;
}

// The number of values that are stored, and of codes past the last one.
inline int64_t with_spare(int64_t values, const Weight& w) { return values + (w.width == 1 ? SPARE_CODES : 0); }

// Calls f with the active entries of a weight.
template <class F>
auto with_entries(const Weight& w, F f) {
    if (w.bits) return f(EntryBits(w));
    if (w.positions || !w.active) return f(EntryPositions(w));
    return f(AllEntries(w));
}

// Returns the parts of a sparse weight; `parts` and `groups` of ungrouped ones are 1.
Cuts cuts_of(const Recipe& r);

// Numbers the lists of offsets: phases whose taps differ by a shift alone share one, since the base of their blocks has
// the shift. Fills `phases`, and returns how many lists there are.
int64_t number_lists(const Recipe& r, Phase* phases);

// Fills `bounds`, at most split + 1 of them, with the first output channel of each part of about equal work, and with
// the end of the last one. Returns the number of parts.
int64_t split_rows(const Recipe& r, const Weight& w, int64_t* bounds);

// Checks all but the positions of a weight, and computes the sizes that `measure` returns.
Fault sizes_of(const Recipe& r, const Weight& w, Sizes& s);

}  // namespace dsr
