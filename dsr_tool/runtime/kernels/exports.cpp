// What a library of one level exports to Python for inference: its kernels, its threads, and what this build is like.

#include "kernels.h"
#include "layout.h"
#include "pack.h"

using namespace dsr;
using dsr::DSR_LEVEL::LEVEL;

extern "C" {

#define ABI(number) \
    int dsr_kernels_abi() { return number; }
#include "ops.def"

// Floats in a vector of this build.
int dsr_lanes() { return LEVEL.lanes; }

// Vectors in the widest tile that spmm has, for sparse (0) and for dense (1) parts; the compiler must ask for no more.
int dsr_widest_tile(int dense) { return dense ? LEVEL.widest_dense : LEVEL.widest; }

// The layout of the structs; ends with a row without a name.
const LayoutRow* dsr_layout() { return LAYOUT; }

void dsr_run(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers, int64_t images,
             Pool* pool, float* scratch) {
    LEVEL.run(ops, count, starts, steps, buffers, images, pool, scratch);
}

// As dsr_run, and adds the nanoseconds of each op to `nanoseconds`.
void dsr_run_timed(const Op* ops, int64_t count, float* const* starts, const int64_t* steps, int64_t buffers,
                   int64_t images, Pool* pool, float* scratch, int64_t* nanoseconds) {
    LEVEL.run_timed(ops, count, starts, steps, buffers, images, pool, scratch, nanoseconds);
}

// Floating-point operations per nanosecond of one thread whose multiply-adds stay in registers; takes about 10 ms.
double dsr_peak() { return LEVEL.peak(); }

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
