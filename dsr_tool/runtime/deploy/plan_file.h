// A plan file (.dsrplan) in memory: steps for the kernels of one level, their weights, and the arrays between them.
//
// The file holds, for each level, the ops of a plan as ops.def describes them; docs/format.md has every byte. Its ops
// are trusted less than those that the compiler makes: work records are made anew from masks and values
// (kernels/pack.h), so their offsets are right by construction, and all other fields and tables are compared with the
// sizes of what they address (check.h) before a kernel sees them.
#pragma once

#include "../kernels/pack.h"
#include "levels.h"
#include "memory.h"

namespace dsr {

constexpr int MAX_RANK = 8;

// An input or output of the plan.
struct Value {
    const char* name;
    int64_t rank;
    int64_t shape[MAX_RANK];
    int64_t entries;
};

// A text by its name.
struct Text {
    const char *name, *value;
};

// An array that steps exchange: 0 is one of their own, 1 an input, 2 an output of the plan.
struct Exchanged {
    int64_t entries, role, index;
    Array<float> own;
};

// A segment of ops, run once for each of `images` pieces of its arrays.
struct Step {
    int64_t images = 0, first_op = 0, op_count = 0;
    Array<int64_t> arrays;  // numbers of exchanged arrays; buffer b + 1 of the ops is array b
    Array<int64_t> steps;   // floats from one piece to the next, of each buffer; the first is the arena's
};

// Packed weights, as the kernels read them.
struct Pack {
    Recipe recipe;
    int64_t tile = 0;
    Array<float> values;
    Array<int8_t> codes;
    Array<uint16_t> offsets;
    Array<Entry> entries;
    Array<Block> blocks;
    Array<Part> parts;
};

struct PlanFile {
    const Level* level = nullptr;
    Array<uint8_t> head;  // texts, inputs and outputs lie in here
    Array<Text> texts;
    Array<Value> inputs, outputs;
    Array<Array<uint8_t>> tables;  // biases, pixel masks, index tables: those that ops of this level read
    Array<Pack> packs;
    Array<Exchanged> exchanged;
    Array<Step> steps;
    Array<Op> ops;
    int64_t arena_floats = 0;

    // Reads and checks a file for the best level that runs here. After false, which comes with a problem, nothing of it
    // may be used.
    bool read(const void* bytes, int64_t size, int threads, Problem& problem);
};

}  // namespace dsr
