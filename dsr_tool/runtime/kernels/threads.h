// The threads that share the work of one op.
#pragma once

#include <cstdint>

#include "ops.h"

namespace dsr {

struct Pool;

// One op in one run: where its buffers lie now, and the threads that share the work.
struct Call {
    const Op& op;
    const float* source;
    const float* other;  // null where the op has no second input
    float* out;
    Pool* pool;
    float* scratch;  // SCRATCH_FLOATS for each thread of the pool; what one op leaves there, no other op needs
};

// Makes a pool of `threads` with the caller as one of them; null for one thread, or where the system has no more.
Pool* new_pool(int threads);

// Ends the threads of a pool, and frees it; null is a pool of one thread.
void free_pool(Pool* pool);

// Calls f(context, i) for every i below n on the threads of the pool; neighbouring i tend to stay on one thread.
void parallel(Pool* pool, int64_t n, void (*f)(const void*, int64_t), const void* context);

// Calls f(context, i, thread) likewise, with the number of the thread that calls it, the caller's being 0.
void parallel(Pool* pool, int64_t n, void (*f)(const void*, int64_t, int), const void* context);

// Threads that take items of a round, the caller among them; 1 without a pool.
int threads_of(const Pool* pool);

// Calls f(call, i) for every i below `count`, in about 32 shares of neighbouring i.
void in_shares(const Call& call, void (*f)(const Call&, int64_t), int64_t count);

}  // namespace dsr
