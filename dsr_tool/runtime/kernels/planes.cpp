// Operations that take each plane by itself: pools, activations, sums of two values, means, and moves between layouts.

#include "kernels.h"

namespace {

constexpr int64_t ITEMS = 32;  // about as many pieces of work for all threads: enough to share, few to ask for

struct Work {
    const Operation& op;
    const float *in, *other;
    float* out;
};

using PerPlane = void (*)(const Work&, int64_t);

struct Planes {
    const Work& work;
    PerPlane f;
    int64_t count, at_once;
};

void run_some(const void* context, int64_t item) {
    const Planes& planes = *(const Planes*)context;
    const int64_t begin = item * planes.at_once, end = begin + planes.at_once;
    for (int64_t i = begin; i < (end < planes.count ? end : planes.count); i++) planes.f(planes.work, i);
}

void each_plane(const Work& work, PerPlane f, int64_t count, Pool* pool) {
    const Planes planes{work, f, count, count / ITEMS + 1};
    parallel(pool, (count + planes.at_once - 1) / planes.at_once, run_some, &planes);
}

Vec activated(const Operation& op, Vec x) {
    switch (op.activation) {
        case SIGMOID: return sigmoid(x);
        case SILU: return x * sigmoid(x);
        case HARD_SIGMOID: return clip(x * op.alpha + op.beta, splat(0), splat(1));
        case HARD_SWISH: return x * clip(x * op.alpha + op.beta, splat(0), splat(1));
        case GELU: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
        case TANH: return hyperbolic_tangent(x);
        case ELU: return select(x < 0.0f, op.alpha * (exponential(clip(x, splat(-88), splat(0))) - 1.0f), x);
        case LEAKY_RELU: return select(x < 0.0f, op.alpha * x, x);
        default: return clip(x, splat(op.low), splat(op.high));
    }
}

Bits inside(const Operation& op, int64_t plane, int64_t i) {
    if (!op.mask) return ~Bits{};
    Bits mask;
    std::memcpy(&mask, op.mask + (plane % op.phases * op.length + i) * LANES, sizeof mask);
    return mask;
}

void pool_plane(const Work& work, int64_t plane) {
    const Operation& op = work.op;
    const int64_t channel = plane / op.phases, phase = plane % op.phases;
    const float* in = work.in + channel * op.inner * op.in_stride * LANES;
    const int32_t* tap = op.index + phase * op.count;
    float* out = work.out + plane * op.out_stride * LANES;
    for (int64_t i = 0; i < op.length; i++) {
        Vec most = load(in + (tap[0] + i) * LANES);
        for (int64_t k = 1; k < op.count; k++) {
            const Vec x = load(in + (tap[k] + i) * LANES);
            most = select((x > most) | (x != x), x, most);
        }
        store(out + i * LANES, masked(inside(op, plane, i), most));
    }
}

// A piece of every phase of one channel, since neighbouring pixels go to different phases: what was read for one is
// still in the cache for the next.
constexpr int64_t PIECE = 8 * LANES;

void gather_channel(const Work& work, int64_t channel) {
    const Operation& op = work.op;
    const float* in = work.in + channel * op.in_stride;
    for (int64_t begin = 0; begin < op.count; begin += PIECE) {
        const int64_t end = begin + PIECE < op.count ? begin + PIECE : op.count;
        for (int64_t phase = 0; phase < op.phases; phase++) {
            const int32_t* index = op.index + phase * op.count;
            float* out = work.out + (channel * op.phases + phase) * op.inner;
            // Four at a time, since a compiler's own way of doing it, a gather instruction, is slower than single loads.
            int64_t i = begin;
            for (; i + 4 <= end; i += 4) {
                const float a = in[index[i]], b = in[index[i + 1]], c = in[index[i + 2]], d = in[index[i + 3]];
                out[i] = a, out[i + 1] = b, out[i + 2] = c, out[i + 3] = d;
            }
            for (; i < end; i++) out[i] = in[index[i]];
            if (op.mask)
                for (int64_t v = begin / LANES; v < end / LANES; v++)
                    store(out + v * LANES, masked(inside(op, phase, v), load(out + v * LANES)));
        }
    }
}

// Without a table, one row of entries as it is.
constexpr int64_t COPIED = 1 << 14;

void copy_piece(const void* context, int64_t item) {
    const Work& work = *(const Work*)context;
    const int64_t begin = item * COPIED, count = work.op.count - begin < COPIED ? work.op.count - begin : COPIED;
    std::memcpy(work.out + begin, work.in + begin, 4 * count);
}

Vec combined(int32_t how, Vec a, Vec b) {
    switch (how) {
        case ADD: return a + b;
        case SUBTRACT: return a - b;
        case MULTIPLY: return a * b;
        default: return a / b;
    }
}

void combine_plane(const Work& work, int64_t plane) {
    const Operation& op = work.op;
    const float* a = work.in + plane * op.in_stride * LANES;
    const float* b = work.other + plane * op.other_stride * LANES;
    float* out = work.out + plane * op.out_stride * LANES;
    for (int64_t i = 0; i < op.length; i++) {
        Vec x = load(a + i * LANES);
        if (work.other) x = combined(op.flag, x, load(b + i * LANES));
        store(out + i * LANES, masked(inside(op, plane, i), activated(op, x)));
    }
}

void channel_plane(const Work& work, int64_t plane) {
    const Operation& op = work.op;
    const int64_t channel = plane / op.phases;
    const Vec factor = splat(work.other ? work.other[channel] : op.values[channel]);
    const Vec shift = splat(op.bias ? op.bias[channel] : 0);
    const float* in = work.in + plane * op.in_stride * LANES;
    float* out = work.out + plane * op.out_stride * LANES;
    for (int64_t i = 0; i < op.length; i++)
        store(out + i * LANES, masked(inside(op, plane, i), activated(op, load(in + i * LANES) * factor + shift)));
}

void mean_channel(const Work& work, int64_t channel) {
    const Operation& op = work.op;
    Vec total{};
    for (int64_t phase = 0; phase < op.phases; phase++) {
        const float* in = work.in + (channel * op.phases + phase) * op.in_stride * LANES;
        // Sums of sums, which round less.
        for (int64_t begin = 0; begin < op.length; begin += 64) {
            Vec part{};
            for (int64_t i = begin; i < op.length && i < begin + 64; i++) part += load(in + i * LANES);
            total += part;
        }
    }
    work.out[channel] = sum(total) * op.alpha;
}

// Vector i before the plane is vector i + length one lane up, which may lie before the plane itself, and so on.
void halo_plane(const Work& work, int64_t plane) {
    const Operation& op = work.op;
    const int64_t length = op.length;
    float* out = work.out + plane * op.out_stride * LANES;
    for (int64_t i = -1; i >= -op.before; i--) store(out + i * LANES, raised(load(out + (i + length) * LANES)));
    for (int64_t i = length; i < length + op.after; i++)
        store(out + i * LANES, lowered(load(out + (i - length) * LANES)));
}

}  // namespace

void activate_masked(const Operation& op, float* x, const int32_t* mask, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        Vec v = activated(op, load(x + i * LANES));
        if (mask) {
            Bits bits;
            std::memcpy(&bits, mask + i * LANES, sizeof bits);
            v = masked(bits, v);
        }
        store(x + i * LANES, v);
    }
}

void activate(const Operation& op, float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const size_t bytes = 4 * (count - i < LANES ? count - i : LANES);
        Vec v{};
        std::memcpy(&v, x + i, bytes);
        v = activated(op, v);
        std::memcpy(x + i, &v, bytes);
    }
}

void max_pool(const Operation& op, const float* in, float* out, Pool* pool) {
    each_plane({op, in, nullptr, out}, pool_plane, op.channels * op.phases, pool);
}

void gather(const Operation& op, const float* in, float* out, Pool* pool) {
    const Work work{op, in, nullptr, out};
    if (op.index)
        each_plane(work, gather_channel, op.channels, pool);
    else
        parallel(pool, (op.count + COPIED - 1) / COPIED, copy_piece, &work);
}

void combine(const Operation& op, const float* a, const float* b, float* out, Pool* pool) {
    each_plane({op, a, b, out}, combine_plane, op.channels * op.phases, pool);
}

void channelwise(const Operation& op, const float* in, const float* factors, float* out, Pool* pool) {
    each_plane({op, in, factors, out}, channel_plane, op.channels * op.phases, pool);
}

void mean(const Operation& op, const float* in, float* out, Pool* pool) {
    each_plane({op, in, nullptr, out}, mean_channel, op.channels, pool);
}

void fill_halo(const Operation& op, float* out, Pool* pool) {
    if (op.before || op.after) each_plane({op, nullptr, nullptr, out}, halo_plane, op.channels * op.phases, pool);
}
