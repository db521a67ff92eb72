// Activations of training kernels: values and derivatives, which treat ends of ranges and NaN as torch does.
//
// They are the rows ACTIVATION of ops.def. CLIP covers the identity, ReLU and ReLU6; the first two are kinds of their
// own here, since an infinite value is not at a limit.
#pragma once

#include <cmath>

#include "vectors.h"
#include "ops.h"

// These kernels are in the libraries of single levels alone, so they need no namespaces of their own.
using namespace dsr;
using namespace dsr::DSR_LEVEL;

namespace planes {

enum Function { IDENTITY, RELU, BETWEEN, LEAKY, LOGISTIC, SWISH, HARD_LOGISTIC, HARD_SWISH_3 };

struct Bend {
    int32_t activation;  // a row ACTIVATION
    float low, high;     // limits of CLIP; low is the slope below zero of LEAKY_RELU

    Function function() const {
        switch (activation) {
            case SIGMOID: return LOGISTIC;
            case SILU: return SWISH;
            case HARD_SIGMOID: return HARD_LOGISTIC;
            case HARD_SWISH: return HARD_SWISH_3;
            case LEAKY_RELU: return LEAKY;
            default: return high < INFINITY ? BETWEEN : low > -INFINITY ? RELU : IDENTITY;
        }
    }
};

template <Function F> inline Vec bent(const Bend& bend, Vec x) {
    switch (F) {
        case IDENTITY: return x;
        case RELU: return x < 0.0f ? Vec{} : x;
        case BETWEEN: return clip(x, splat(bend.low), splat(bend.high));
        case LEAKY: return x > 0.0f ? x : x * bend.low;
        case LOGISTIC: return sigmoid(x);
        case SWISH: return x * sigmoid(x);
        case HARD_LOGISTIC: return clip(x + 3.0f, splat(0), splat(6)) * (1.0f / 6);
        default: return x * clip(x + 3.0f, splat(0), splat(6)) * (1.0f / 6);
    }
}

// FROM_VALUE tells whether argument and value lie on the same side of every limit, so that the derivative follows from
// either.
template <Function F> constexpr bool FROM_VALUE = F == IDENTITY || F == RELU || F == BETWEEN || F == LEAKY;

// The gradient of the argument, from that of the value. `x` is the argument, or the value where FROM_VALUE.
template <Function F> inline Vec unbent(const Bend& bend, Vec x, Vec gradient) {
    switch (F) {
        case IDENTITY: return gradient;
        case RELU: return masked(~(x <= 0.0f), gradient);
        case BETWEEN: return masked(~((x <= bend.low) | (x >= bend.high)), gradient);
        case LEAKY: return select(x > 0.0f, gradient, gradient * bend.low);
        case LOGISTIC: {
            const Vec s = sigmoid(x);
            return gradient * (s * (1.0f - s));
        }
        case SWISH: {
            const Vec s = sigmoid(x);
            return gradient * (s * (1.0f + x * (1.0f - s)));
        }
        case HARD_LOGISTIC: return masked(~((x <= -3.0f) | (x >= 3.0f)), gradient * (1.0f / 6));
        default: {
            const Vec inside = gradient * (x * (1.0f / 3) + 0.5f);
            return select(x >= 3.0f, gradient, masked(~(x <= -3.0f), inside));
        }
    }
}

template <Function F> struct Constant {
    static constexpr Function value = F;
};

// Calls run(Constant<F>{}) for the function F of a Bend.
template <class R> void with_function(const Bend& bend, const R& run) {
    switch (bend.function()) {
        case IDENTITY: return run(Constant<IDENTITY>{});
        case RELU: return run(Constant<RELU>{});
        case BETWEEN: return run(Constant<BETWEEN>{});
        case LEAKY: return run(Constant<LEAKY>{});
        case LOGISTIC: return run(Constant<LOGISTIC>{});
        case SWISH: return run(Constant<SWISH>{});
        case HARD_LOGISTIC: return run(Constant<HARD_LOGISTIC>{});
        default: return run(Constant<HARD_SWISH_3>{});
    }
}
}  // namespace planes
