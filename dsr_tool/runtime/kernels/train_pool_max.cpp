// Max pools in the blocked layout, forward and backward.

#include <cmath>

#include "train_pool.h"

using namespace planes;

namespace planes {

// Windows of a max pool in one direction: output o covers the inputs o * stride - before + k * dilation.
struct PoolAxis {
    int64_t inputs, outputs, kernel, stride, before, dilation;

    // The entries of a window that are inside of the input: from `first` to before `last`.
    struct Range {
        int64_t first, last;
    };
    Range range(int64_t output) const {
        const int64_t before_it = -input(output, 0), left = inputs - 1 - input(output, 0);
        // No division for nearly all windows.
        if (before_it <= 0 && left >= (kernel - 1) * dilation) return {0, kernel};
        const int64_t inside = left < 0 ? 0 : left / dilation + 1;
        return {before_it > 0 ? (before_it + dilation - 1) / dilation : 0, inside < kernel ? inside : kernel};
    }
    int64_t input(int64_t output, int64_t entry) const { return output * stride - before + entry * dilation; }
};

struct MaxPool2d {
    int64_t planes, lanes;
    PoolAxis rows, columns;
};

}  // namespace planes

namespace {

// The largest entry of a window, and which one it is. As in torch the first of equal ones wins, and NaN over all;
// planes without NaN need one comparison less. `COLUMNS` is the width of a kernel whose loop is worth unrolling, or 0.
template <class W, bool NAN_TOO, int COLUMNS>
__attribute__((always_inline)) inline void largest_of(const MaxPool2d& pool, const float* x, PoolAxis::Range ys,
                                                      PoolAxis::Range xs, float* y, uint8_t* taken) {
    const int64_t step = pool.columns.dilation * pool.lanes;
    const int64_t row = pool.rows.dilation * pool.columns.inputs * pool.lanes;
    typename W::Floats most = typename W::Floats{} - INFINITY;
    typename W::Ints which = typename W::Ints{} + (int32_t)(ys.first * pool.columns.kernel + xs.first);
    for (int64_t ky = ys.first; ky < ys.last; ky++) {
        const float* from = x + ky * row;
        const int32_t number = (int32_t)(ky * pool.columns.kernel);
        const int64_t last = COLUMNS ? COLUMNS : xs.last;
#pragma GCC unroll 3
        for (int64_t kx = COLUMNS ? 0 : xs.first; kx < last; kx++) {
            const auto v = W::load(from + kx * step);
            const typename W::Ints here = typename W::Ints{} + (int32_t)(number + kx);
            which = v > most ? here : which;
            most = v > most ? v : most;
            if (!NAN_TOO) continue;
            which = v != v ? here : which;
            most = v != v ? v : most;
        }
    }
    W::store(y, most);
    const auto bytes = __builtin_convertvector(which, typename W::Bytes);
    std::memcpy(taken, &bytes, sizeof bytes);
}

template <class W, bool NAN_TOO, int COLUMNS>
void max_plane(const MaxPool2d& pool, const float* x, float* y, uint8_t* taken) {
    constexpr int64_t WIDTH = sizeof(typename W::Floats) / 4;
    for (int64_t oy = 0; oy < pool.rows.outputs; oy++) {
        const auto ys = pool.rows.range(oy);
        const float* row = x + pool.rows.input(oy, 0) * pool.columns.inputs * pool.lanes;
        for (int64_t ox = 0; ox < pool.columns.outputs; ox++) {
            const auto xs = pool.columns.range(ox);
            const float* from = row + pool.columns.input(ox, 0) * pool.lanes;
            const int64_t out = (oy * pool.columns.outputs + ox) * pool.lanes;
            for (int64_t lane = 0; lane < pool.lanes; lane += WIDTH)
                if (COLUMNS && xs.last - xs.first == COLUMNS)
                    largest_of<W, NAN_TOO, COLUMNS>(pool, from + lane, ys, xs, y + out + lane, taken + out + lane);
                else
                    largest_of<W, NAN_TOO, 0>(pool, from + lane, ys, xs, y + out + lane, taken + out + lane);
        }
    }
}

bool has_nan(const float* x, int64_t count) {
    Bits found[WIDE]{};
    sweep(0, count, [&](int64_t i, int sum, int, int64_t left) {
        const Vec v = get(x + i, left);
        found[sum] |= v != v;
    });
    const Bits any = (found[0] | found[1]) | (found[2] | found[3]);
    int32_t bits = 0;
    for (int l = 0; l < LANES; l++) bits |= any[l];
    return bits;
}

template <class W> void max_plane(const MaxPool2d& pool, const float* x, float* y, uint8_t* taken) {
    if (has_nan(x, inputs(pool))) return max_plane<W, true, 0>(pool, x, y, taken);
    if (pool.columns.kernel == 3) return max_plane<W, false, 3>(pool, x, y, taken);
    if (pool.columns.kernel == 2) return max_plane<W, false, 2>(pool, x, y, taken);
    max_plane<W, false, 0>(pool, x, y, taken);
}

template <class W>
void max_plane_backward(const MaxPool2d& pool, const float* gradient, const uint8_t* taken, float* x) {
    constexpr int64_t WIDTH = sizeof(typename W::Floats) / 4;
    const PoolAxis &rows = pool.rows, &columns = pool.columns;
    std::memset(x, 0, 4 * inputs(pool));
    for (int64_t oy = 0; oy < rows.outputs; oy++) {
        const auto ys = rows.range(oy);
        for (int64_t ox = 0; ox < columns.outputs; ox++) {
            const auto xs = columns.range(ox);
            const int64_t out = (oy * columns.outputs + ox) * pool.lanes;
            for (int64_t lane = 0; lane < pool.lanes; lane += WIDTH) {
                const auto g = W::load(gradient + out + lane);
                typename W::Bytes bytes;
                std::memcpy(&bytes, taken + out + lane, sizeof bytes);
                const auto which = __builtin_convertvector(bytes, typename W::Ints);
                for (int64_t ky = ys.first; ky < ys.last; ky++) {
                    float* row = x + rows.input(oy, ky) * columns.inputs * pool.lanes + lane;
                    for (int64_t kx = xs.first; kx < xs.last; kx++) {
                        float* to = row + columns.input(ox, kx) * pool.lanes;
                        const typename W::Ints mine = which == (int32_t)(ky * columns.kernel + kx);
                        W::store(to, W::load(to) + W::select(mine, g, typename W::Floats{}));
                    }
                }
            }
        }
    }
}

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
}
