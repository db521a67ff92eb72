// The weights of a product in the order of use: floats, or codes of a grid.
//
// A code is a whole number of 8 bits, and its value is the code times the scale of its output channel. So a record
// takes 3 bytes instead of 6. There are three ways from codes to values, and each is the cheapest somewhere:
//
//   for_each    A vector of codes at a time: their values stay in a register. Sums have every bit of those of values.
//   converted   All codes of a part before its first tile, which all tiles read as floats. Sums have every bit as well.
//   at          One code: its float comes from a table that stays in the first-level cache, so that costs one more load
//               of a few bytes. Whoever adds up codes multiplies the sum by the scale.
#pragma once

#include "kernels.h"

namespace dsr::DSR_LEVEL {

struct CodeTable {
    float values[256] = {};

    constexpr CodeTable() {
        for (int i = 0; i < 256; i++) values[i] = (float)(i < 128 ? i : i - 256);
    }
};

static constexpr CodeTable CODE_TABLE;

constexpr int64_t AT_ONCE = 64;  // weights that `floats` returns

// On a lambda: its code becomes part of the caller's, whose sums then stay in registers.
#define INLINE __attribute__((always_inline))

// Floats and Codes read weights of one kind each. P is the struct of an op's parameters.
struct Floats {
    static constexpr bool SCALED = false;

    template <class P>
    static const float* of(const P&, const float* values) {
        return values;
    }
    static float at(const float* weight) { return *weight; }
    // Calls f with each weight of one output channel, in all lanes.
    template <class F>
    static void for_each(const float* weights, int64_t count, const float*, int64_t, F f) {
        for (const float* end = weights + count; weights != end; weights++) f(splat(*weights));
    }
    static Vec vector_at(const float* weights) { return load(weights); }
    static const float* floats(const float* weights, float*) { return weights; }
};

struct Codes {
    static constexpr bool SCALED = true;  // `at` returns codes, and their sums have to be multiplied by a scale

    template <class P>
    static const int8_t* of(const P& op, const float*) {
        return op.codes;
    }
    static float at(const int8_t* weight) { return CODE_TABLE.values[(uint8_t)*weight]; }
    // Codes are visited alike, as values: f gets them from a register, where a float is loaded again for its broadcast.
    // The loop over lanes is unrolled with its exit in each step: a loop over the rest would be a branch that is often
    // predicted wrong.
    template <class F>
    static void for_each(const int8_t* codes, int64_t count, const float* scales, int64_t row, F f) {
        const Vec scale = splat(scales[row]);
        for (const int8_t* end = codes + count; codes != end;) {
            const Vec values = load_codes(codes) * scale;
#pragma GCC unroll 16
            for (int i = 0; i < LANES && codes != end; i++, codes++) f(splat(values[i]));
        }
    }
    static Vec vector_at(const int8_t* weights) { return load_codes(weights); }
    static const float* floats(const int8_t* weights, float* buffer) {
        for (int64_t i = 0; i < AT_ONCE; i += LANES) store(buffer + i, load_codes(weights + i));
        return buffer;
    }
};

// Returns the factors of a vector of an entry's codes: a scale, or those of four output channels in turn where these
// share their records.
static inline Vec scales_of(const Op& op, const Part& part, int64_t row) {
    if (!part.dense) return splat(op.spmm.scales[row]);
    float scales[LANES];
    // If fewer than four channels are left, the last one takes the place of the others (pack_fill.cpp).
    for (int64_t i = 0; i < LANES; i++) {
        const int64_t channel = row + i % 4;
        scales[i] = op.spmm.scales[channel < op.channels ? channel : op.channels - 1];
    }
    return load(scales);
}

// Returns the values of a part's codes, which every thread computes once for all its tiles of that part. They are those
// of the reference, bit for bit.
//
//   number   of the call of the kernel in this process, from 1 on
//   group    number of the part among those of one phase; parts that differ by their phase alone share their weights
//   own      scratch of the thread, where the values lie
static inline const float* converted(const Op& op, int64_t number, int64_t group, Scratch& own) {
    static_assert((MAX_CONVERTED + LANES) * sizeof(float) <= sizeof own.floats, "the values do not fit");
    float* values = own.floats;
    if (own.number == number && own.group == group) return values;
    own.number = number;
    own.group = group;
    // Copies, since a store of vectors may change everything else for all that the compiler knows.
    const Part part = op.spmm.parts[group * op.phases];
    const int64_t start = op.spmm.blocks[part.first].values;
    for (int64_t b = part.first; b < part.last; b++) {
        // Between two blocks of a part with zeros lie the codes of other parts.
        const Block block = op.spmm.blocks[b];
        const int8_t* code = op.spmm.codes + block.values;
        float* to = values + (block.values - start);
        const Entry* entry = op.spmm.entries + block.entries;
        for (const Entry* end = entry + block.count; entry != end; entry++) {
            const Vec scale = scales_of(op, part, entry->row);
            const int64_t count = entry->count * (part.dense ? 4 : 1);
            // The last vector may be too long; the next entry overwrites the rest.
            for (int64_t i = 0; i < count; i += LANES) store(to + i, load_codes(code + i) * scale);
            to += count;
            code += count;
        }
    }
    return values;
}

}  // namespace dsr::DSR_LEVEL
