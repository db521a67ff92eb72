// Declarations that the files of the kernels share.
#pragma once

#include "ops.h"
#include "threads.h"
#include "vectors.h"

namespace dsr {

// The kernels of one level of the processor, as whoever runs a plan sees them.
struct Level {
    const char* name;
    int32_t lanes;       // floats in a vector
    int32_t widest;      // vectors in the widest tile that spmm has for sparse parts; a plan must ask for no more
    int32_t widest_dense;  // the same for dense parts

    // Runs `count` ops once for each of `images`. Buffer 0 is the arena; the others are arrays of the caller, which
    // advance by `steps` floats from one image to the next. `scratch` is what `Call` says, and starts as zeros.
    void (*run)(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers,
                int64_t images, Pool* pool, float* scratch);

    // Runs the same, and adds the nanoseconds of each op, over all images, to `nanoseconds`.
    void (*run_timed)(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers,
                      int64_t images, Pool* pool, float* scratch, int64_t* nanoseconds);

    // Returns the floating-point operations per nanosecond of one thread whose multiply-adds stay in registers.
    double (*peak)();
};

namespace DSR_LEVEL {

extern const Level LEVEL;

// Widest tiles of spmm in vectors: accumulators, the broadcast value and, in dense tiles, the inputs have to fit in the
// registers.
#if DSR_LANES == 16 || defined(__aarch64__)
constexpr int WIDEST = 14, WIDEST_DENSE = 6;  // of 32 registers
#else
constexpr int WIDEST = 12, WIDEST_DENSE = 3;  // of 16 registers
#endif

// Each kind of op is computed by one function, named in its row of ops.def.
#define OP(kind, number, function, line) void function(const Call& call);
#include "ops.def"

// The memory of one thread for an op.
struct Scratch {
    // The call of SPMM and the group of its parts whose converted values lie there; no op but SPMM writes these two.
    int64_t number, group;
    alignas(64) float floats[SCRATCH_FLOATS - 16];
};
static_assert(sizeof(Scratch) == SCRATCH_FLOATS * sizeof(float), "the scratch of a thread has another size");

static inline Scratch& scratch_of(float* scratch, int thread) { return ((Scratch*)scratch)[thread]; }

// The combination of two vectors; FIRST is none.
static inline Vec combined(int64_t how, Vec a, Vec b) {
    switch (how) {
        case ADD: return a + b;
        case SUBTRACT: return a - b;
        case MULTIPLY: return a * b;
        default: return a / b;
    }
}

// Applies the activation of an op to `count` vectors in place, and zeroes what lies outside of the mask.
void activate_masked(const Op& op, float* x, const int32_t* mask, int64_t count);

// Applies the activation of an op to `count` floats in place.
void activate(const Op& op, float* x, int64_t count);

// Fills the halo around each plane of the result.
void fill_halo(const Call& call);

// `Level::peak`.
double peak();

}  // namespace DSR_LEVEL
}  // namespace dsr
