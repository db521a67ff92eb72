// Declarations that the files of the kernels share.
#pragma once

#include "ops.h"
#include "vectors.h"

struct Pool;

// One op in one run: where its buffers lie now, and the threads that share the work.
struct Call {
    const Op& op;
    const float* source;
    const float* other;  // null where the op has no second input
    float* out;
    Pool* pool;
};

// Each kind of op is computed by one function, named in its row of ops.def.
#define OP(kind, number, function, line) void function(const Call& call);
#include "ops.def"

// Calls f(context, i) for every i below n on the threads of the pool; neighbouring i tend to stay on one thread.
void parallel(Pool* pool, int64_t n, void (*f)(const void*, int64_t), const void* context);

// Threads that take items of a round, the caller among them; 1 without a pool.
int threads_of(const Pool* pool);

// Calls f(call, i) for every i below `count`, in about 32 shares of neighbouring i.
void in_shares(const Call& call, void (*f)(const Call&, int64_t), int64_t count);

// Applies the activation of an op to `count` vectors in place, and zeroes what lies outside of the mask.
void activate_masked(const Op& op, float* x, const int32_t* mask, int64_t count);

// Applies the activation of an op to `count` floats in place.
void activate(const Op& op, float* x, int64_t count);

// Fills the halo around each plane of the result.
void fill_halo(const Call& call);

// Widest tiles of spmm in vectors, for sparse and for dense parts.
int widest_tile(bool dense);
