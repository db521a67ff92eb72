// The weights of a product in the order of use: floats, or codes of a grid.
//
// A code is a whole number of 8 bits, and its value is the code times the scale of its output channel. So a record
// takes 3 bytes instead of 6. Kernels add up codes times inputs, and multiply a sum by its scale once, at the end. The
// float of a code comes from a table that stays in the first-level cache. That costs one more load of a few bytes, for
// which processors have ports to spare; converting a code in a register would cost as much as a multiply-add.
#pragma once

#include "kernels.h"

struct CodeTable {
    float values[256] = {};

    constexpr CodeTable() {
        for (int i = 0; i < 256; i++) values[i] = (float)(i < 128 ? i : i - 256);
    }
};

static constexpr CodeTable CODE_TABLE;

constexpr int64_t AT_ONCE = 64;  // weights that `floats` returns

// Floats and Codes read weights of one kind each. P is the struct of an op's parameters.
struct Floats {
    static constexpr bool SCALED = false;

    template <class P>
    static const float* of(const P&, const float* values) {
        return values;
    }
    static float at(const float* weight) { return *weight; }
    static Vec vector_at(const float* weights) { return load(weights); }
    static const float* floats(const float* weights, float*) { return weights; }
};

struct Codes {
    static constexpr bool SCALED = true;  // sums have to be multiplied by the scale of their output channel

    template <class P>
    static const int8_t* of(const P& op, const float*) {
        return op.codes;
    }
    static float at(const int8_t* weight) { return CODE_TABLE.values[(uint8_t)*weight]; }
    static Vec vector_at(const int8_t* weights) { return load_codes(weights); }
    static const float* floats(const int8_t* weights, float* buffer) {
        for (int64_t i = 0; i < AT_ONCE; i += LANES) store(buffer + i, load_codes(weights + i));
        return buffer;
    }
};

// Returns the values of a part's codes, which every thread computes once for all its tiles of that part. They are those
// of the reference, bit for bit.
//
//   number   of the call of the kernel in this process, from 1 on
//   group    number of the part among those of one phase; parts that differ by their phase alone share their weights
static inline const float* converted(const Op& op, int64_t number, int64_t group) {
    static thread_local float values[MAX_CONVERTED + LANES];
    static thread_local int64_t last_number, last_group;  // those of the values that lie there
    if (last_number == number && last_group == group) return values;
    last_number = number;
    last_group = group;
    // In variables of their own, since a store of vectors may change everything else for all that the compiler knows.
    const float* scales = op.spmm.scales;
    const Part part = op.spmm.parts[group * op.phases];
    const int8_t* code = op.spmm.codes + op.spmm.blocks[part.first].values;
    float* to = values;
    for (int64_t b = part.first; b < part.last; b++) {
        const Entry* entry = op.spmm.entries + op.spmm.blocks[b].entries;
        for (const Entry* end = entry + op.spmm.blocks[b].count; entry != end; entry++) {
            const Vec scale = splat(scales[entry->row]);
            const int64_t count = entry->count;
            // The last vector may be too long; the next entry overwrites the rest.
            for (int64_t i = 0; i < count; i += LANES) store(to + i, load_codes(code + i) * scale);
            to += count;
            code += count;
        }
    }
    return values;
}
