// Ops that take each plane by itself: MAX_POOL, COMBINE, SCALE and MEAN; and the halo of every result.
//
// All of them walk over the vectors of a plane in order and touch each float once or a few times, so memory is the
// limit and arithmetic is free. Planes are independent, so threads share them.

#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

Vec activated(const Op& op, Vec x) {
    switch (op.activation) {
        case SIGMOID: return sigmoid(x);
        case SILU: return x * sigmoid(x);
        case HARD_SIGMOID: return clip(x * op.slope + op.shift, splat(0), splat(1));
        case HARD_SWISH: return x * clip(x * op.slope + op.shift, splat(0), splat(1));
        case GELU: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
        case TANH: return hyperbolic_tangent(x);
        case ELU: return select(x < 0.0f, op.negative_scale * (exponential(clip(x, splat(-88), splat(0))) - 1.0f), x);
        case LEAKY_RELU: return select(x < 0.0f, op.negative_scale * x, x);
        default: return clip(x, splat(op.low), splat(op.high));
    }
}

// Bits of the pixels in vector i of a plane. Positions without a pixel must stay zero where a later op reads past the end
// of a row of pixels; where none does, the plan has no mask and all entries count.
Bits inside(const Op& op, int64_t plane, int64_t i) {
    if (!op.mask) return ~Bits{};
    Bits mask;
    std::memcpy(&mask, op.mask + (plane % op.phases * op.length + i) * LANES, sizeof mask);
    return mask;
}

// MAX_POOL. The taps of a window are vector offsets, as the records of spmm are: every tap is one aligned load for all
// lanes. Border pixels meet zeros of the halo, so the plan uses this kernel for padded windows on inputs >= 0 only. NaN
// wins over everything, as in numpy.
void pool_plane(const Call& call, int64_t plane) {
    const Op& op = call.op;
    const int64_t channel = plane / op.phases, phase = plane % op.phases, taps = op.max_pool.taps_per_phase;
    const float* in = call.source + channel * op.max_pool.source_phases * op.source_stride * LANES;
    const int32_t* tap = op.max_pool.taps + phase * taps;
    float* out = call.out + plane * op.out_stride * LANES;
    for (int64_t i = 0; i < op.length; i++) {
        Vec most = load(in + (tap[0] + i) * LANES);
        for (int64_t k = 1; k < taps; k++) {
            const Vec x = load(in + (tap[k] + i) * LANES);
            most = select((x > most) | (x != x), x, most);
        }
        store(out + i * LANES, masked(inside(op, plane, i), most));
    }
}

// COMBINE. Two values whose entries lie alike, or one alone; then the activation. A value that is not planes counts as
// one plane of whole vectors: its buffer is rounded up, so the last vector may be computed in full.
void combine_plane(const Call& call, int64_t plane) {
    const Op& op = call.op;
    const float* a = call.source + plane * op.source_stride * LANES;
    const float* b = call.other + plane * op.other_stride * LANES;
    float* out = call.out + plane * op.out_stride * LANES;
    for (int64_t i = 0; i < op.length; i++) {
        Vec x = load(a + i * LANES);
        if (op.combine.how != FIRST) x = combined(op.combine.how, x, load(b + i * LANES));
        store(out + i * LANES, masked(inside(op, plane, i), activated(op, x)));
    }
}

// SCALE. The second input has one factor per channel, entry after entry, and was computed by the ops before.
void scale_plane(const Call& call, int64_t plane) {
    const Op& op = call.op;
    const Vec factor = splat(call.other[plane / op.phases]);
    const float* in = call.source + plane * op.source_stride * LANES;
    float* out = call.out + plane * op.out_stride * LANES;
    for (int64_t i = 0; i < op.length; i++)
        store(out + i * LANES, masked(inside(op, plane, i), activated(op, load(in + i * LANES) * factor)));
}

// MEAN. The sum over all vectors of a channel, over lanes at the end, times 1 / pixels; positions without a pixel are
// zero.
void mean_channel(const Call& call, int64_t channel) {
    const Op& op = call.op;
    const Mean& mean = op.mean;
    Vec total{};
    for (int64_t phase = 0; phase < mean.source_phases; phase++) {
        const float* in = call.source + (channel * mean.source_phases + phase) * op.source_stride * LANES;
        // Sums of 64 vectors each, then the sum of those: a long chain of additions would round more.
        for (int64_t begin = 0; begin < mean.source_length; begin += 64) {
            Vec part{};
            for (int64_t i = begin; i < mean.source_length && i < begin + 64; i++) part += load(in + i * LANES);
            total += part;
        }
    }
    call.out[channel] = sum(total) * mean.factor;
}

// The halo. Vector i before a plane is vector i + length, one lane up: the end of the strip before. That vector may lie
// before the plane itself, so copies are made from the plane outwards.
void halo_plane(const Call& call, int64_t plane) {
    const Op& op = call.op;
    const int64_t length = op.length;
    float* out = call.out + plane * op.out_stride * LANES;
    for (int64_t i = -1; i >= -op.halo_before; i--) store(out + i * LANES, raised(load(out + (i + length) * LANES)));
    for (int64_t i = length; i < length + op.halo_after; i++)
        store(out + i * LANES, lowered(load(out + (i - length) * LANES)));
}

}  // namespace

void activate_masked(const Op& op, float* x, const int32_t* mask, int64_t count) {
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

void activate(const Op& op, float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        // An array of the caller ends where it ends, so the last vector is read and written in part.
        const size_t bytes = 4 * (count - i < LANES ? count - i : LANES);
        Vec v{};
        std::memcpy(&v, x + i, bytes);
        v = activated(op, v);
        std::memcpy(x + i, &v, bytes);
    }
}

void max_pool(const Call& call) { in_shares(call, pool_plane, call.op.channels * call.op.phases); }

void combine(const Call& call) { in_shares(call, combine_plane, call.op.channels * call.op.phases); }

void scale(const Call& call) { in_shares(call, scale_plane, call.op.channels * call.op.phases); }

void mean(const Call& call) { in_shares(call, mean_channel, call.op.mean.channels); }

void fill_halo(const Call& call) {
    const Op& op = call.op;
    if (op.halo_before || op.halo_after) in_shares(call, halo_plane, op.channels * op.phases);
}

}  // namespace dsr::DSR_LEVEL
