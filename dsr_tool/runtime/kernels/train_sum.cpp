// Sums of two tensors with an activation, and activations alone: entry by entry, whatever the layout.

#include "train_activations.h"
#include "train_planes.h"

using namespace planes;

namespace {

// Calls f(i, left) for each vector of `count` floats.
template <class F> void entries(int64_t count, Pool* pool, const F& f) {
    each(pool, (count + SHARE - 1) / SHARE, SHARE, [&](int64_t share) {
        const int64_t begin = share * SHARE, end = begin + SHARE < count ? begin + SHARE : count;
        sweep(begin, end, [&](int64_t i, int, int, int64_t left) { f(i, left); });
    });
}

}  // namespace

extern "C" {

// y = activation(a + b) of `count` floats; b may be null.
void dsr_add_act_forward(int64_t count, const float* a, const float* b, const Bend* bend, float* y, Pool* pool) {
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        if (b) entries(count, pool, [&](int64_t i, int64_t left) {
            put(y + i, bent<F>(*bend, get(a + i, left) + get(b + i, left)), left);
        });
        else entries(count, pool, [&](int64_t i, int64_t left) { put(y + i, bent<F>(*bend, get(a + i, left)), left); });
    });
}

// The gradient of a + b, from that of y. `x` is a + b, or y where the activation is a CLIP or a LEAKY_RELU.
void dsr_act_backward(int64_t count, const float* x, const float* gradient, const Bend* bend, float* x_gradient,
                      Pool* pool) {
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        entries(count, pool, [&](int64_t i, int64_t left) {
            put(x_gradient + i, unbent<F>(*bend, get(x + i, left), get(gradient + i, left)), left);
        });
    });
}
}
