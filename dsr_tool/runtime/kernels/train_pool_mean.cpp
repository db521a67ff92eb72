// Means over windows in the blocked layout, forward and backward: average, adaptive and global pools.

#include "train_pool.h"

using namespace planes;

namespace planes {

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
    std::memset(x, 0, 4 * inputs(pool));
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

}  // namespace

extern "C" {

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
