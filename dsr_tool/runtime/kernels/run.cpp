// Runs a list of ops: a plan is an array of Op structs, walked over once for each image of a batch. There is no decision
// left to take here except which kernel a kind names.

#include "clock.h"
#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

const float* at(float* const* buffers, int32_t buffer, int64_t offset) {
    return buffer < 0 ? nullptr : buffers[buffer] + offset;
}

void run_op(const Op& op, float* const* buffers, Pool* pool, float* scratch) {
    const Call call{op, at(buffers, op.source_buffer, op.source_offset), at(buffers, op.other_buffer, op.other_offset),
                    (float*)at(buffers, op.out_buffer, op.out_offset), pool, scratch};
    switch (op.kind) {
#define OP(kind, number, function, line) \
    case kind: function(call); break;
#include "ops.def"
    }
    fill_halo(call);
}

void run(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers, int64_t images,
         Pool* pool, float* scratch) {
    float* now[MAX_BUFFERS];
    for (int64_t image = 0; image < images; image++) {
        for (int64_t b = 0; b < buffers; b++) now[b] = starts[b] + image * steps[b];
        for (int64_t i = 0; i < count; i++) run_op(ops[i], now, pool, scratch);
    }
}

// A clock is read once after each op: about 25 ns, a thousandth of a short op.
void run_timed(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers,
               int64_t images, Pool* pool, float* scratch, int64_t* nanoseconds) {
    float* now[MAX_BUFFERS];
    for (int64_t image = 0; image < images; image++) {
        for (int64_t b = 0; b < buffers; b++) now[b] = starts[b] + image * steps[b];
        int64_t before = now_ns();
        for (int64_t i = 0; i < count; i++) {
            run_op(ops[i], now, pool, scratch);
            const int64_t after = now_ns();
            nanoseconds[i] += after - before;
            before = after;
        }
    }
}

#define QUOTED_AGAIN(name) #name
#define QUOTED(name) QUOTED_AGAIN(name)

}  // namespace

extern const Level LEVEL = {QUOTED(DSR_LEVEL), LANES, WIDEST, WIDEST_DENSE, run, run_timed, peak};

}  // namespace dsr::DSR_LEVEL
