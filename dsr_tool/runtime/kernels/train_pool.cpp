// Pooling in the blocked layout, forward and backward.
//
// A pixel is a run of lanes, so every window is computed for all of them at once, and planes are independent: threads
// share them. The backward passes go over the outputs in order and add to the inputs of each window, which are still in
// the first-level cache from the window before.

#include <cmath>

#include "train_planes.h"

using namespace planes;

namespace planes {

// Windows of a max pool in one direction: output o covers the inputs o * stride - before + k * dilation.
struct PoolAxis {
    int64_t inputs, outputs, kernel, stride, before, dilation;

    // The first entry of a window that is inside of the input, and the one after the last.
    int64_t first(int64_t output) const {
        const int64_t outside = -input(output, 0);
        return outside > 0 ? (outside + dilation - 1) / dilation : 0;
    }
    int64_t last(int64_t output) const {
        const int64_t left = inputs - 1 - input(output, 0);
        const int64_t inside = left < 0 ? 0 : left / dilation + 1;
        return inside < kernel ? inside : kernel;
    }
    int64_t input(int64_t output, int64_t entry) const { return output * stride - before + entry * dilation; }
};

struct MaxPool2d {
    int64_t planes, lanes;
    PoolAxis rows, columns;
};

// Windows of a mean in one direction: output o covers inputs from first[o] to before last[o], and counts as size[o].
struct MeanAxis {
    const int64_t *first, *last, *size;
    int64_t inputs, outputs;
};

struct MeanPool2d {
    int64_t planes, lanes;
    MeanAxis rows, columns;
};

}  // namespace planes

namespace {

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

// The largest entry of each window, and which one it is. As in torch the first of equal ones wins, and NaN over all.
template <class W> void max_plane(const MaxPool2d& pool, const float* x, float* y, uint8_t* taken) {
    constexpr int64_t WIDTH = sizeof(typename W::Floats) / 4;
    const PoolAxis &rows = pool.rows, &columns = pool.columns;
    for (int64_t oy = 0; oy < rows.outputs; oy++) {
        const int64_t y0 = rows.first(oy), y1 = rows.last(oy);
        for (int64_t ox = 0; ox < columns.outputs; ox++) {
            const int64_t x0 = columns.first(ox), x1 = columns.last(ox);
            const int64_t out = (oy * columns.outputs + ox) * pool.lanes;
            for (int64_t lane = 0; lane < pool.lanes; lane += WIDTH) {
                typename W::Floats most = typename W::Floats{} - INFINITY;
                typename W::Ints which = typename W::Ints{} + (int32_t)(y0 * columns.kernel + x0);
                for (int64_t ky = y0; ky < y1; ky++) {
                    const float* row = x + rows.input(oy, ky) * columns.inputs * pool.lanes + lane;
                    for (int64_t kx = x0; kx < x1; kx++) {
                        const auto v = W::load(row + columns.input(ox, kx) * pool.lanes);
                        const typename W::Ints wins = (v > most) | (v != v);
                        most = W::select(wins, v, most);
                        which = (wins & (int32_t)(ky * columns.kernel + kx)) | (~wins & which);
                    }
                }
                W::store(y + out + lane, most);
                const auto bytes = __builtin_convertvector(which, typename W::Bytes);
                std::memcpy(taken + out + lane, &bytes, sizeof bytes);
            }
        }
    }
}

template <class W> void max_plane_backward(const MaxPool2d& pool, const float* gradient, const uint8_t* taken, float* x) {
    constexpr int64_t WIDTH = sizeof(typename W::Floats) / 4;
    const PoolAxis &rows = pool.rows, &columns = pool.columns;
    std::memset(x, 0, 4 * rows.inputs * columns.inputs * pool.lanes);
    for (int64_t oy = 0; oy < rows.outputs; oy++) {
        const int64_t y0 = rows.first(oy), y1 = rows.last(oy);
        for (int64_t ox = 0; ox < columns.outputs; ox++) {
            const int64_t x0 = columns.first(ox), x1 = columns.last(ox);
            const int64_t out = (oy * columns.outputs + ox) * pool.lanes;
            for (int64_t lane = 0; lane < pool.lanes; lane += WIDTH) {
                const auto g = W::load(gradient + out + lane);
                typename W::Bytes bytes;
                std::memcpy(&bytes, taken + out + lane, sizeof bytes);
                const auto which = __builtin_convertvector(bytes, typename W::Ints);
                for (int64_t ky = y0; ky < y1; ky++) {
                    float* row = x + rows.input(oy, ky) * columns.inputs * pool.lanes + lane;
                    for (int64_t kx = x0; kx < x1; kx++) {
                        float* to = row + columns.input(ox, kx) * pool.lanes;
                        const typename W::Ints mine = which == (int32_t)(ky * columns.kernel + kx);
                        W::store(to, W::load(to) + W::select(mine, g, typename W::Floats{}));
                    }
                }
            }
        }
    }
}

template <class W> void mean_plane(const MeanPool2d& pool, const float* x, float* y) {
    constexpr int64_t WIDTH = sizeof(typename W::Floats) / 4;
    const MeanAxis &rows = pool.rows, &columns = pool.columns;
    for (int64_t oy = 0; oy < rows.outputs; oy++)
        for (int64_t ox = 0; ox < columns.outputs; ox++)
            for (int64_t lane = 0; lane < pool.lanes; lane += WIDTH) {
                // Sums of rows, then the sum of those: one long chain of additions would round more.
                typename W::Floats sum{};
                for (int64_t iy = rows.first[oy]; iy < rows.last[oy]; iy++) {
                    const float* row = x + iy * columns.inputs * pool.lanes + lane;
                    typename W::Floats part{};
                    for (int64_t ix = columns.first[ox]; ix < columns.last[ox]; ix++)
                        part += W::load(row + ix * pool.lanes);
                    sum += part;
                }
                const float size = (float)(rows.size[oy] * columns.size[ox]);
                W::store(y + (oy * columns.outputs + ox) * pool.lanes + lane, sum / size);
            }
}

template <class W> void mean_plane_backward(const MeanPool2d& pool, const float* gradient, float* x) {
    constexpr int64_t WIDTH = sizeof(typename W::Floats) / 4;
    const MeanAxis &rows = pool.rows, &columns = pool.columns;
    std::memset(x, 0, 4 * rows.inputs * columns.inputs * pool.lanes);
    for (int64_t oy = 0; oy < rows.outputs; oy++)
        for (int64_t ox = 0; ox < columns.outputs; ox++)
            for (int64_t lane = 0; lane < pool.lanes; lane += WIDTH) {
                const float size = (float)(rows.size[oy] * columns.size[ox]);
                const auto g = W::load(gradient + (oy * columns.outputs + ox) * pool.lanes + lane) / size;
                for (int64_t iy = rows.first[oy]; iy < rows.last[oy]; iy++) {
                    float* row = x + iy * columns.inputs * pool.lanes + lane;
                    for (int64_t ix = columns.first[ox]; ix < columns.last[ox]; ix++) {
                        float* to = row + ix * pool.lanes;
                        W::store(to, W::load(to) + g);
                    }
                }
            }
}

// Floats of one plane before and after the pool.
template <class P> int64_t inputs(const P& pool) { return pool.rows.inputs * pool.columns.inputs * pool.lanes; }
template <class P> int64_t outputs(const P& pool) { return pool.rows.outputs * pool.columns.outputs * pool.lanes; }

}  // namespace

extern "C" {

// The kernel has at most 256 entries, since `taken` holds the one that each output took as a byte.
void dsr_max_pool_forward(const MaxPool2d* pool, const float* x, float* y, uint8_t* taken, Pool* threads) {
    with_width(pool->lanes, [&](auto wide) {
        each(threads, pool->planes, inputs(*pool), [&](int64_t i) {
            const int64_t out = i * outputs(*pool);
            max_plane<decltype(wide)>(*pool, x + i * inputs(*pool), y + out, taken + out);
        });
    });
}

void dsr_max_pool_backward(const MaxPool2d* pool, const float* gradient, const uint8_t* taken, float* x_gradient,
                           Pool* threads) {
    with_width(pool->lanes, [&](auto wide) {
        each(threads, pool->planes, inputs(*pool), [&](int64_t i) {
            const int64_t out = i * outputs(*pool);
            max_plane_backward<decltype(wide)>(*pool, gradient + out, taken + out, x_gradient + i * inputs(*pool));
        });
    });
}

void dsr_mean_pool_forward(const MeanPool2d* pool, const float* x, float* y, Pool* threads) {
    with_width(pool->lanes, [&](auto wide) {
        each(threads, pool->planes, inputs(*pool), [&](int64_t i) {
            mean_plane<decltype(wide)>(*pool, x + i * inputs(*pool), y + i * outputs(*pool));
        });
    });
}

void dsr_mean_pool_backward(const MeanPool2d* pool, const float* gradient, float* x_gradient, Pool* threads) {
    with_width(pool->lanes, [&](auto wide) {
        each(threads, pool->planes, inputs(*pool), [&](int64_t i) {
            mean_plane_backward<decltype(wide)>(*pool, gradient + i * outputs(*pool), x_gradient + i * inputs(*pool));
        });
    });
}
}
