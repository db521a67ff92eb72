// What a library of one level exports to Python for inference: its kernels, its threads, and what this build is like.

#include <cstddef>

#include "kernels.h"
#include "pack.h"

using namespace dsr;
using dsr::DSR_LEVEL::LEVEL;

namespace {

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
#define PACKING(name, number, line) {"Packing." #name, number, 0},
#define FAULT(name, number, line) {"Fault." #name, number, 0},
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
int dsr_lanes() { return LEVEL.lanes; }

// Vectors in the widest tile that spmm has, for sparse (0) and for dense (1) parts; the compiler must ask for no more.
int dsr_widest_tile(int dense) { return dense ? LEVEL.widest_dense : LEVEL.widest; }

// The layout of the structs; ends with a row without a name.
const Row* dsr_layout() { return LAYOUT; }

void dsr_run(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers, int64_t images,
             Pool* pool) {
    LEVEL.run(ops, count, starts, steps, buffers, images, pool);
}

Pool* dsr_pool_new(int threads) { return new_pool(threads); }

void dsr_pool_free(Pool* pool) { free_pool(pool); }

int dsr_pack_measure(const Recipe* recipe, const Weight* weight, Sizes* sizes) {
    return int(measure(*recipe, *weight, *sizes));
}

int dsr_pack_fill(const Recipe* recipe, const Weight* weight, const Sizes* sizes, const Packed* packed) {
    return int(fill(*recipe, *weight, *sizes, *packed));
}

// Returns the number of parts, and replaces the vectors of a tile by those for so many threads.
int64_t dsr_share(int64_t threads, int64_t length, int64_t phases, int64_t* tile) {
    const Share shared = share(threads, length, *tile, phases);
    *tile = shared.tile;
    return shared.parts;
}
}
