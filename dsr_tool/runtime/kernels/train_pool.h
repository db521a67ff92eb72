// Pools share this file: pixels as vectors.
//
// A pixel is a run of lanes, so every window is computed for all of them at once, and planes are independent: threads
// share them. The backward passes go over the outputs in order and add to the inputs of each window, which are still in
// the first-level cache from the window before.
#pragma once

#include "train_planes.h"

namespace planes {

// Vectors of a pixel: as wide as the build's, or as the pixel where that is narrower.
template <int WIDTH> struct Wide {
    typedef float Floats __attribute__((vector_size(4 * WIDTH)));
    typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
    typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

    static Floats load(const float* from) {
        Floats v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
    static Floats select(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }
};

// Calls run(Wide<...>{}) with the widest vectors that a pixel fills.
template <class R> void with_width([[maybe_unused]] int64_t lanes, const R& run) {
#if DSR_LANES >= 16
    if (lanes >= 16) return run(Wide<16>{});
#endif
#if DSR_LANES >= 8
    if (lanes >= 8) return run(Wide<8>{});
#endif
    return run(Wide<4>{});
}

// Floats of one plane before and after the pool.
template <class P> int64_t inputs(const P& pool) { return pool.rows.inputs * pool.columns.inputs * pool.lanes; }
template <class P> int64_t outputs(const P& pool) { return pool.rows.outputs * pool.columns.outputs * pool.lanes; }

}  // namespace planes
