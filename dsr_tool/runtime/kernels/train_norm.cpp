// Batch norm in the blocked layout, with a residual and an activation in the same pass, forward and backward.
//
// Memory is the limit, so each channel is done by one thread from its first float to its last: its statistics are read
// from memory, and the pass that needs them finds the channel in the cache. No sum is split among threads, so results
// have the same bits for any number of them.

#include "train_activations.h"
#include "train_planes.h"

using namespace planes;

namespace {

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
};

// Calls f(mask, begin, end, ahead) for each chunk of a channel; the plane after this one is `ahead` floats further.
template <class F> inline void chunks(const Shape& shape, const Masks& masks, int64_t channel, const F& f) {
    for (int64_t block = 0; block < shape.blocks; block++) {
        const Mask& mask = masks.of(block);
        const int64_t start = shape.start(block, channel), end = start + shape.plane;
        const int64_t ahead = shape.ahead(block, channel);
        for (int64_t at = start; at < end; at += CHUNK) f(mask, at, at + CHUNK < end ? at + CHUNK : end, ahead);
    }
}

struct Forward {
    Shape shape;
    Masks masks;
    const float *x, *residual, *weight, *bias;
    float *running_mean, *running_variance;
    double momentum, epsilon;
    double* statistics;  // (2, channels): mean, and standard deviation with epsilon
    bool training;
    Bend bend;
    float* y;

    void set_statistics(int64_t channel) const {
        double mean = 0, variance = 0;
        if (training) {
            measure(channel, &mean, &variance);
        } else {
            mean = running_mean[channel];
            variance = running_variance[channel];
        }
        statistics[channel] = mean;
        statistics[shape.channels + channel] = std::sqrt(variance + epsilon);
    }

    // Sums of differences from the mean of the first chunk, which keep the digits of a small variance under a large
    // mean. However far off that mean is, the variance has its share of it, so few digits cancel.
    void measure(int64_t channel, double* mean, double* variance) const {
        const float shift = first_mean(channel);
        Sums all;
        chunks(shape, masks, channel, [&](const Mask& mask, int64_t begin, int64_t end, int64_t ahead) {
            Vec sums[WIDE]{}, squares[WIDE]{};
            sweep(begin, end, [&](int64_t i, int sum, int k, int64_t left) {
                prefetch(x + i + ahead);
                const Vec d = mask.keep(get(x + i, left) - shift, k, left);
                sums[sum] += d;
                squares[sum] += d * d;
            });
            all.add(sums, squares);
        });
        const double n = (double)shape.values(), offset = all.sum() / n, square = all.product() - n * offset * offset;
        *mean = shift + offset;
        *variance = square < 0 ? 0 : square / n;
        if (!running_mean) return;
        const double unbiased = *variance * (n / (n - 1));
        running_mean[channel] = (float)((1 - momentum) * running_mean[channel] + momentum * *mean);
        running_variance[channel] = (float)((1 - momentum) * running_variance[channel] + momentum * unbiased);
    }

    float first_mean(int64_t channel) const {
        const int64_t begin = shape.start(0, channel), floats = shape.plane < CHUNK ? shape.plane : CHUNK;
        const Mask& mask = masks.of(0);
        Vec sums[WIDE]{};
        sweep(begin, begin + floats,
              [&](int64_t i, int sum, int k, int64_t left) { sums[sum] += mask.keep(get(x + i, left), k, left); });
        Sums all;
        all.add(sums, sums);
        return (float)(all.sum() / (double)(floats / shape.lanes * shape.images_in(0)));
    }

    template <Function F, bool ADD> void apply(int64_t channel) const {
        const Affine affine(statistics[channel], statistics[shape.channels + channel], weight, bias, channel);
        for (int64_t block = 0; block < shape.blocks; block++) {
            const int64_t start = shape.start(block, channel), ahead = shape.ahead(block, channel);
            sweep(start, start + shape.plane, [&](int64_t i, int, int, int64_t left) {
                if (ADD) prefetch(residual + i + ahead);
                prefetch(y + i + ahead);
                Vec v = (get(x + i, left) - affine.center) * affine.scale + affine.shift;
                if (ADD) v += get(residual + i, left);
                put(y + i, bent<F>(bend, v), left);
            });
        }
    }
};

struct Backward {
    Shape shape;
    Masks masks;
    const float *x, *y, *gradient, *weight, *bias;
    const double* statistics;
    bool training;
    Bend bend;
    float *x_gradient, *residual_gradient, *weight_gradient, *bias_gradient;

    template <Function F, bool ADD> void run(int64_t channel) const {
        const double mean = statistics[channel], deviation = statistics[shape.channels + channel];
        const Affine affine(mean, deviation, weight, bias, channel);
        Sums sums;
        if (training || ADD || weight_gradient || bias_gradient) reduce<F, ADD>(channel, affine, &sums);
        // `product` is of the gradient and x - mean, where the sums have x - center.
        const double sum = sums.sum(), product = sums.product() - (mean - affine.center) * sum;
        if (weight_gradient) weight_gradient[channel] = (float)(product / deviation);
        if (bias_gradient) bias_gradient[channel] = (float)sum;
        if (!x_gradient) return;
        // In training, x moves the mean and the deviation too: both take their part of the gradient back.
        double constant = 0, slope = 0;
        if (training) {
            const double n = (double)shape.values(), factor = affine.scale;
            slope = -factor * product / (n * deviation * deviation);
            constant = -factor * sum / n - slope * (mean - affine.center);
        }
        apply<F, ADD>(channel, affine, (float)constant, (float)slope);
    }

    // The gradient before the activation. Where a residual was added, the argument of the activation is not known, but
    // its value is: y.
    template <Function F, bool ADD> Vec inner(const Affine& affine, Vec centered, int64_t i, int64_t left) const {
        const Vec g = get(gradient + i, left);
        if (F == IDENTITY) return g;
        return unbent<F>(bend, ADD ? get(y + i, left) : centered * affine.scale + affine.shift, g);
    }

    template <Function F, bool ADD> void reduce(int64_t channel, const Affine& affine, Sums* all) const {
        chunks(shape, masks, channel, [&](const Mask& mask, int64_t begin, int64_t end, int64_t ahead) {
            Vec sums[WIDE]{}, products[WIDE]{};
            sweep(begin, end, [&](int64_t i, int sum, int k, int64_t left) {
                prefetch(x + i + ahead);
                prefetch(gradient + i + ahead);
                if (ADD && F != IDENTITY) prefetch(y + i + ahead);
                if (ADD) prefetch(residual_gradient + i + ahead);
                const Vec centered = get(x + i, left) - affine.center;
                const Vec g = mask.keep(inner<F, ADD>(affine, centered, i, left), k, left);
                if (ADD) put(residual_gradient + i, g, left);
                sums[sum] += g;
                products[sum] += g * mask.keep(centered, k, left);
            });
            all->add(sums, products);
        });
    }

    template <Function F, bool ADD>
    void apply(int64_t channel, const Affine& affine, float constant, float slope) const {
        chunks(shape, masks, channel, [&](const Mask& mask, int64_t begin, int64_t end, int64_t ahead) {
            sweep(begin, end, [&](int64_t i, int, int k, int64_t left) {
                prefetch(x_gradient + i + ahead);
                const Vec centered = get(x + i, left) - affine.center;
                const Vec g = ADD ? get(residual_gradient + i, left) : inner<F, ADD>(affine, centered, i, left);
                put(x_gradient + i, mask.keep(g * affine.scale + (centered * slope + constant), k, left), left);
            });
        });
    }
};

// Calls f(channel) for each channel of a tensor.
template <class F> void channels(const Shape& shape, Pool* pool, const F& f) {
    each(pool, shape.channels, shape.blocks * shape.plane, f);
}

}  // namespace

extern "C" {

// y = activation(norm(x) + residual). Statistics are those of x in training, and then the running ones move towards
// them; otherwise they are the running ones. Either way they come out as (2, channels) for the backward pass: mean, and
// square root of variance + epsilon. Every array may be null but x, statistics and y. With a residual, `bend` must be
// the identity, a CLIP or a LEAKY_RELU.
void dsr_norm_forward(const Shape* shape, const float* x, const float* residual, const float* weight, const float* bias,
                      float* running_mean, float* running_variance, double momentum, double epsilon, int training,
                      const Bend* bend, double* statistics, float* y, Pool* pool) {
    const Forward pass{*shape, Masks(*shape), x, residual, weight, bias, running_mean, running_variance, momentum,
                       epsilon, statistics, training != 0, *bend, y};
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        channels(*shape, pool, [&](int64_t channel) {
            pass.set_statistics(channel);
            if (!residual) pass.apply<F, false>(channel);
            else if constexpr (FROM_VALUE<F>) pass.apply<F, true>(channel);
        });
    });
}

// Gradients of dsr_norm_forward from that of y. If `residual_gradient` is not null there was a residual, and y is
// needed. Others that are null are not computed; those of x and of the residual are zero in padding.
void dsr_norm_backward(const Shape* shape, const float* x, const float* y, const float* gradient, const float* weight,
                       const float* bias, const double* statistics, int training, const Bend* bend, float* x_gradient,
                       float* residual_gradient, float* weight_gradient, float* bias_gradient, Pool* pool) {
    const Backward pass{*shape, Masks(*shape), x, y, gradient, weight, bias, statistics, training != 0, *bend,
                        x_gradient, residual_gradient, weight_gradient, bias_gradient};
    with_function(*bend, [&](auto function) {
        constexpr Function F = decltype(function)::value;
        channels(*shape, pool, [&](int64_t channel) {
            if (!residual_gradient) pass.run<F, false>(channel);
            else if constexpr (FROM_VALUE<F>) pass.run<F, true>(channel);
        });
    });
}
}
