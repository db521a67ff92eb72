// What the files of the kernels share.
#pragma once

#include "ops.h"
#include "vectors.h"

struct Pool;

// Call f(context, i) for every i below n, on the threads of the pool; f for neighbouring i tends to stay on one.
void parallel(Pool* pool, int64_t n, void (*f)(const void*, int64_t), const void* context);

// Apply the activation of an operation to `count` vectors in place, and clear what lies outside of the mask.
void activate_masked(const Operation& op, float* x, const int32_t* mask, int64_t count);

// Apply the activation of an operation to `count` floats in place.
void activate(const Operation& op, float* x, int64_t count);

void product(const Operation& op, const float* in, const float* residual, float* out, Pool* pool);
void max_pool(const Operation& op, const float* in, float* out, Pool* pool);
void gather(const Operation& op, const float* in, float* out, Pool* pool);
void regrid(const Operation& op, const float* in, float* out, Pool* pool);
void combine(const Operation& op, const float* a, const float* b, float* out, Pool* pool);
void channelwise(const Operation& op, const float* in, const float* factors, float* out, Pool* pool);
void mean(const Operation& op, const float* in, float* out, Pool* pool);
void rows(const Operation& op, const float* in, const float* residual, float* out, Pool* pool);
void from_rows(const Operation& op, const float* in, float* out, Pool* pool);
void to_rows(const Operation& op, const float* in, float* out, Pool* pool);
void normalize(const Operation& op, const float* in, float* out, Pool* pool);
void softmax(const Operation& op, const float* in, float* out, Pool* pool);
void fill_halo(const Operation& op, float* out, Pool* pool);
