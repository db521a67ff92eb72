// The interpreter: one call runs a list of operations for each input of a batch.

#include "kernels.h"

namespace {

constexpr int MOST_SPACES = 256;  // the plan has no more

const float* at(float* const* spaces, int32_t space, int64_t offset) {
    return space < 0 ? nullptr : spaces[space] + offset;
}

void run_one(const Operation& op, float* const* spaces, Pool* pool) {
    const float* in = at(spaces, op.in_space, op.in);
    const float* other = at(spaces, op.other_space, op.other);
    float* out = (float*)at(spaces, op.out_space, op.out);
    switch (op.kind) {
        case PRODUCT: product(op, in, other, out, pool); break;
        case MAX_POOL: max_pool(op, in, out, pool); break;
        case GATHER: gather(op, in, out, pool); break;
        case REGRID: regrid(op, in, out, pool); break;
        case COMBINE: combine(op, in, other, out, pool); break;
        case CHANNELWISE: channelwise(op, in, other, out, pool); break;
        case MEAN: mean(op, in, out, pool); break;
        case ROWS: rows(op, in, other, out, pool); break;
        case FROM_ROWS: from_rows(op, in, out, pool); break;
        case TO_ROWS: to_rows(op, in, out, pool); break;
        case NORMALIZE: normalize(op, in, out, pool); break;
        case SOFTMAX: softmax(op, in, out, pool); break;
    }
    fill_halo(op, out, pool);
}

}  // namespace

extern "C" {

// Changes with the arguments of these functions, the kinds of operations and what their fields mean; kernels/library.py
// has the same number.
int dsr_kernels_abi() { return 2; }

int dsr_lanes() { return LANES; }

// Of what the plan and this build must agree on.
int64_t dsr_operation_bytes() { return sizeof(Operation); }

// Run `count` operations once for each of `images`. Space 0 is the arena; the others are arrays of the caller, which
// go on by `steps` floats from one image to the next.
void dsr_run(const Operation* operations, int64_t count, float* const* starts, const int64_t* steps, int64_t spaces,
             int64_t images, Pool* pool) {
    float* now[MOST_SPACES];
    for (int64_t image = 0; image < images; image++) {
        for (int64_t s = 0; s < spaces; s++) now[s] = starts[s] + image * steps[s];
        for (int64_t i = 0; i < count; i++) run_one(operations[i], now, pool);
    }
}
}
