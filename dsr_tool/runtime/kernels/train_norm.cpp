// Batch norm in the blocked layout, with a residual and an activation in the same pass, forward and backward.
//
// Memory is the limit, so each channel is done by one thread from its first float to its last: its statistics are read
// from memory, and the pass that needs them finds the channel in the cache. No sum is split among threads, so results
// have the same bits for any number of them.

#include "train_planes.h"
#include "train_activations.h"

using namespace planes;

namespace {

// Mean and variance so far. Chunks are summed in float32 as differences from the mean so far, which keeps the digits of
// a small variance under a large mean, and merged in float64 (Chan, Golub and LeVeque, 1983). The error of a chunk is
// 1e-7 of its squared distance from that mean, half of which the variance contains in any case.
struct Moments {
    double count = 0, mean = 0, squares = 0;

    template <bool PADDED> void add(const float* x, int64_t begin, int64_t end, const Real<PADDED>& real, double n) {
        if (!count) mean = start(x, begin, end, real, n);
        const float shift = (float)mean;
        Vec sums[WIDE]{}, products[WIDE]{};
        sweep(begin, end, [&](int64_t i, int k, int64_t left) {
            const Vec d = real.keep(get(x + i, left) - shift, k, left);
            sums[k] += d;
            products[k] += d * d;
        });
        const double sum = total(sums) / n;
        merge(n, shift + sum, total(products) - n * sum * sum);
    }

    template <bool PADDED>
    static float start(const float* x, int64_t begin, int64_t end, const Real<PADDED>& real, double n) {
        Vec sums[WIDE]{};
        sweep(begin, end,
              [&](int64_t i, int k, int64_t left) { sums[k] += real.keep(get(x + i, left), k, left); });
        return (float)(total(sums) / n);
    }

    void merge(double n, double other_mean, double other_squares) {
        const double both = count + n, apart = other_mean - (count ? mean : other_mean);
        squares += (other_squares > 0 || other_squares != other_squares ? other_squares : 0) +
                   apart * apart * count * n / both;
        mean = count ? mean + apart * n / both : other_mean;
        count = both;
    }
};

// y = (x - center) * scale + shift, where center is the mean as a float and shift holds what that leaves of it. So a
// mean that is large beside the deviation costs no digits.
struct Affine {
    float center, scale, shift;

    Affine(double mean, double deviation, const float* weight, const float* bias, int64_t channel) {
        const double factor = (weight ? weight[channel] : 1.0) / deviation;
        center = (float)mean;
        scale = (float)factor;
        shift = (float)((bias ? bias[channel] : 0.0) - (mean - center) * factor);
    }

    Vec operator()(Vec x) const { return (x - center) * scale + shift; }
};

// Calls f(real, block, begin, end) for each chunk of a channel.
template <class F> void chunks(const Shape& shape, int64_t channel, const F& f) {
    for (int64_t block = 0; block < shape.blocks; block++) {
        const int64_t images = shape.images_in(block), start = shape.start(block, channel);
        const bool padded = images < shape.lanes;
        const Real<true> some(shape.lanes, images);
        const Real<false> all(shape.lanes, images);
        for (int64_t at = 0; at < shape.plane; at += CHUNK) {
            const int64_t begin = start + at, end = start + (at + CHUNK < shape.plane ? at + CHUNK : shape.plane);
            if (padded) f(some, images, begin, end);
            else f(all, images, begin, end);
        }
    }
}

struct Forward {
    Shape shape;
    const float *x, *residual, *weight, *bias;
    float *running_mean, *running_variance;
    double momentum, epsilon;
    double* statistics;  // (2, channels): mean, and standard deviation with epsilon
    bool training;
    Bend bend;
    float* y;

    void measure(int64_t channel) const {
        double mean = training ? 0 : running_mean[channel], variance = training ? 0 : running_variance[channel];
        if (training) {
            Moments moments;
            chunks(shape, channel, [&](const auto& real, int64_t images, int64_t begin, int64_t end) {
                moments.add(x, begin, end, real, (double)((end - begin) / shape.lanes * images));
            });
            mean = moments.mean;
            variance = moments.squares / moments.count;
            if (running_mean) {
                const double unbiased = moments.squares / (moments.count - 1);
                running_mean[channel] = (float)((1 - momentum) * running_mean[channel] + momentum * mean);
                running_variance[channel] = (float)((1 - momentum) * running_variance[channel] + momentum * unbiased);
            }
        }
        statistics[channel] = mean;
        statistics[shape.channels + channel] = std::sqrt(variance + epsilon);
    }

    template <Function F, bool ADD> void apply(int64_t channel) const {
        const Affine affine(statistics[channel], statistics[shape.channels + channel], weight, bias, channel);
        for (int64_t block = 0; block < shape.blocks; block++) {
            const int64_t start = shape.start(block, channel);
            sweep(start, start + shape.plane, [&](int64_t i, int, int64_t left) {
                Vec v = affine(get(x + i, left));
                if (ADD) v += get(residual + i, left);
                put(y + i, bent<F>(bend, v), left);
            });
        }
    }
};

struct Backward {
    Shape shape;
    const float *x, *y, *gradient, *weight, *bias;
    const double* statistics;
    bool training;
    Bend bend;
    float *x_gradient, *residual_gradient, *weight_gradient, *bias_gradient;

    // The gradient before the activation. With a residual its argument is not known, but its value is (y).
    template <Function F, bool FROM_Y> Vec inner(const Affine& affine, int64_t i, int64_t left, Vec centered) const {
        const Vec g = get(gradient + i, left);
        if (F == IDENTITY) return g;
        return unbent<F>(bend, FROM_Y ? get(y + i, left) : centered * affine.scale + affine.shift, g);
    }

    template <Function F, bool FROM_Y> void channel_gradient(int64_t channel) const {
        const double mean = statistics[channel], deviation = statistics[shape.channels + channel];
        const Affine affine(mean, deviation, weight, bias, channel);
        double sum = 0, product = 0;
        if (training || weight_gradient || bias_gradient || residual_gradient)
            reduce<F, FROM_Y>(channel, affine, &sum, &product);
        product -= (mean - affine.center) * sum;  // of the gradient and x - mean, no longer x - center
        if (weight_gradient) weight_gradient[channel] = (float)(product / deviation);
        if (bias_gradient) bias_gradient[channel] = (float)sum;
        if (!x_gradient) return;
        // In training, x moves the mean and the deviation too: both take their part of the gradient back.
        double constant = 0, slope = 0;
        if (training) {
            const double n = (double)(shape.plane / shape.lanes * shape.images), factor = affine.scale;
            slope = -factor * product / (n * deviation * deviation);
            constant = -factor * sum / n - slope * (mean - affine.center);
        }
        apply<F, FROM_Y>(channel, affine, (float)constant, (float)slope);
    }

    template <Function F, bool FROM_Y>
    void reduce(int64_t channel, const Affine& affine, double* sum, double* product) const {
        chunks(shape, channel, [&](const auto& real, int64_t, int64_t begin, int64_t end) {
            Vec sums[WIDE]{}, products[WIDE]{};
            sweep(begin, end, [&](int64_t i, int k, int64_t left) {
                const Vec centered = get(x + i, left) - affine.center;
                const Vec g = real.keep(inner<F, FROM_Y>(affine, i, left, centered), k, left);
                if (residual_gradient) put(residual_gradient + i, g, left);
                sums[k] += g;
                products[k] += g * real.keep(centered, k, left);
            });
            *sum += total(sums);
            *product += total(products);
        });
    }

    template <Function F, bool FROM_Y>
    void apply(int64_t channel, const Affine& affine, float constant, float slope) const {
        chunks(shape, channel, [&](const auto& real, int64_t, int64_t begin, int64_t end) {
            sweep(begin, end, [&](int64_t i, int k, int64_t left) {
                const Vec centered = get(x + i, left) - affine.center;
                const Vec g = residual_gradient ? get(residual_gradient + i, left)
                                                : inner<F, FROM_Y>(affine, i, left, centered);
                put(x_gradient + i, real.keep(g * affine.scale + (centered * slope + constant), k, left), left);
            });
        });
    }
};

}  // namespace

extern "C" {

// y = activation(norm(x) + residual). Statistics are those of x in training, and then the running ones move towards
// them; otherwise they are the running ones. Either way they come out as (2, channels) for the backward pass: mean, and
// square root of variance + epsilon. Every array may be null but x, statistics and y.
void dsr_norm_forward(const Shape* shape, const float* x, const float* residual, const float* weight, const float* bias,
                      float* running_mean, float* running_variance, double momentum, double epsilon, int training,
                      const Bend* bend, double* statistics, float* y, Pool* pool) {
    const Forward pass{*shape,  x,         residual, weight,     bias,          running_mean, running_variance,
                       momentum, epsilon, statistics, training != 0, *bend,        y};
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        each(pool, shape->channels, shape->blocks * shape->plane, [&](int64_t channel) {
            pass.measure(channel);
            if (residual) pass.apply<F, true>(channel);
            else pass.apply<F, false>(channel);
        });
    });
}

// Gradients of dsr_norm_forward from that of y. With a residual, y is needed and `bend` must be the identity, a CLIP or
// a LEAKY_RELU. Gradients that are null are not computed; those of x and of the residual are zero in padding.
void dsr_norm_backward(const Shape* shape, const float* x, const float* y, const float* gradient, const float* weight,
                       const float* bias, const double* statistics, int training, const Bend* bend, float* x_gradient,
                       float* residual_gradient, float* weight_gradient, float* bias_gradient, Pool* pool) {
    const Backward pass{*shape,         x,     y,          gradient,          weight,          bias, statistics,
                        training != 0, *bend, x_gradient, residual_gradient, weight_gradient, bias_gradient};
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        each(pool, shape->channels, shape->blocks * shape->plane, [&](int64_t channel) {
            if (y) pass.channel_gradient<F, true>(channel);
            else pass.channel_gradient<F, false>(channel);
        });
    });
}

// y = activation(a + b) of `count` floats; b may be null.
void dsr_add_act_forward(int64_t count, const float* a, const float* b, const Bend* bend, float* y, Pool* pool) {
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        each(pool, (count + SHARE - 1) / SHARE, SHARE, [&](int64_t share) {
            const int64_t begin = share * SHARE, end = begin + SHARE < count ? begin + SHARE : count;
            sweep(begin, end, [&](int64_t i, int, int64_t left) {
                Vec v = get(a + i, left);
                if (b) v += get(b + i, left);
                put(y + i, bent<F>(*bend, v), left);
            });
        });
    });
}

// The gradient of a + b, from that of y. `x` is a + b, or y where the activation is a CLIP or a LEAKY_RELU.
void dsr_act_backward(int64_t count, const float* x, const float* gradient, const Bend* bend, float* x_gradient,
                      Pool* pool) {
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        each(pool, (count + SHARE - 1) / SHARE, SHARE, [&](int64_t share) {
            const int64_t begin = share * SHARE, end = begin + SHARE < count ? begin + SHARE : count;
            sweep(begin, end, [&](int64_t i, int, int64_t left) {
                put(x_gradient + i, unbent<F>(*bend, get(x + i, left), get(gradient + i, left)), left);
            });
        });
    });
}
}
