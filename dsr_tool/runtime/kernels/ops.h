// What a plan is made of. runtime/kernels/ops.py mirrors these structs field by field.
//
// A value of channels and pixels is held as planes. A plane is its pixels row by row, `pitch` floats apart, the last
// ones zero, cut into LANES strips of `length`; vector i holds pixel i of every strip. So a step of one pixel in any
// direction is a step of whole vectors. Before and after each plane lie copies of the pixels that the neighbouring
// strips begin and end with (the halo), as many as the kernels that read it reach.
#pragma once

#include <cstdint>

enum Kind : int32_t {
    PRODUCT, MAX_POOL, GATHER, COMBINE, CHANNELWISE, MEAN, ROWS, FROM_ROWS, TO_ROWS, NORMALIZE, SOFTMAX,
    REGRID
};

enum Activation : int32_t { CLIP, SIGMOID, SILU, HARD_SIGMOID, HARD_SWISH, GELU, GELU_TANH, TANH, ELU, LEAKY_RELU };

enum Combination : int32_t { ADD, SUBTRACT, MULTIPLY, DIVIDE };

// An output channel of one block, or four of them that share their offsets.
struct Entry {
    int32_t row;
    int32_t count;  // work records
};

// The work on input channels that together fit in the first-level cache.
struct Block {
    int64_t base;     // vectors from the input's first plane to what offset 0 means
    int64_t values;   // the first value of the first entry
    int64_t offsets;  // its first offset; entries of a dense part share theirs
    int64_t entries;  // the first entry
    int64_t count;    // entries
};

// Output channels of one phase that one thread takes on; those of all phases follow each other.
struct Part {
    int64_t first, last;  // blocks
    int64_t phase;
    int64_t dense;  // four rows share each offset
};

struct Operation {
    int32_t kind, activation;
    int32_t in_space, other_space, out_space, flag;
    int64_t in, other, out;  // floats from the start of the space
    int64_t channels, phases, length;  // of the output: planes = channels * phases, each `length` vectors
    int64_t in_stride, other_stride, out_stride;  // between planes: vectors; floats where values are not planes
    int64_t before, after;  // the output's halo in vectors
    int64_t count, inner;   // meaning by kind; of a product: its parts, and the widest tile
    float low, high, alpha, beta;
    const float* values;
    const uint16_t* offsets;
    const Entry* entries;
    const Block* blocks;
    const Part* parts;
    const float* bias;
    const int32_t* mask;   // (phases, length, LANES) of 0 and -1: -1 where there is a pixel
    const int32_t* index;
};
