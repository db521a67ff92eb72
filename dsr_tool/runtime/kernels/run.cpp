// The entry points of the library: run a list of ops, and tell the compiler what this build is like.
//
// A plan is an array of Op structs. dsr_run walks over it once for each image of a batch; there is no decision left to
// take here except which kernel a kind names.

#include <cstddef>

#include "kernels.h"

namespace {

const float* at(float* const* buffers, int32_t buffer, int64_t offset) {
    return buffer < 0 ? nullptr : buffers[buffer] + offset;
}

void run_op(const Op& op, float* const* buffers, Pool* pool) {
    const Call call{op, at(buffers, op.source_buffer, op.source_offset), at(buffers, op.other_buffer, op.other_offset),
                    (float*)at(buffers, op.out_buffer, op.out_offset), pool};
    switch (op.kind) {
#define OP(kind, number, function, line) \
    case kind: function(call); break;
#include "ops.def"
    }
    fill_halo(call);
}

// The layout of this build, row by row, as the compiler expected it: enums by number, structs by size, fields by offset
// and size. Python reads the same table and refuses a library that differs.
struct Row {
    const char* name;
    int64_t number;  // of a limit or an enum's member; offset of a field; 0 for a struct
    int64_t bytes;   // of a struct or field; 0 for an enum
};

constexpr Row LAYOUT[] = {
#define LIMIT(name, value, line) {"Limit." #name, name, 0},
#define OP(kind, number, function, line) {"Kind." #kind, kind, 0},
#define ACTIVATION(name, number, line) {"Activation." #name, name, 0},
#define COMBINATION(name, number, line) {"Combination." #name, name, 0},
#define STRUCT(name, line) {#name, 0, sizeof(name)},
#define FIELD(name, type, field, line) {#name "." #field, offsetof(name, field), sizeof(name::field)},
#define COMMON(type, field, line) {"Op." #field, offsetof(Op, field), sizeof(Op::field)},
#define PARAMETERS(name, member) {"Op." #member, offsetof(Op, member), sizeof(Op::member)},
#include "ops.def"
    {"Op", 0, sizeof(Op)},
    {nullptr, 0, 0},
};

}  // namespace

extern "C" {

#define ABI(number) \
    int dsr_kernels_abi() { return number; }
#include "ops.def"

// Floats in a vector of this build.
int dsr_lanes() { return LANES; }

// Vectors in the widest tile that spmm has, for sparse (0) and for dense (1) parts; the compiler must ask for no more.
int dsr_widest_tile(int dense) { return widest_tile(dense); }

// The layout of the structs; ends with a row without a name.
const Row* dsr_layout() { return LAYOUT; }

// Runs `count` ops once for each of `images`. Buffer 0 is the arena; the others are arrays of the caller, which advance
// by `steps` floats from one image to the next.
void dsr_run(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers, int64_t images,
             Pool* pool) {
    float* now[MAX_BUFFERS];
    for (int64_t image = 0; image < images; image++) {
        for (int64_t b = 0; b < buffers; b++) now[b] = starts[b] + image * steps[b];
        for (int64_t i = 0; i < count; i++) run_op(ops[i], now, pool);
    }
}
}
