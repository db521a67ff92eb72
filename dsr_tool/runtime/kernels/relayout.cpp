// Pixels that change their layout: RELAYOUT by whole vectors, GATHER pixel by pixel, COPY unchanged.
//
// RELAYOUT moves a channel in three steps through buffers of 64 KiB that stay in the cache: the strips of the source
// are transposed to rows of pixels (squares of LANES x LANES), every factor-th pixel of a row is picked for each phase,
// and rows are transposed back to strips. All loads and stores are whole vectors. GATHER moves one float at a time by a
// table, for what is left: planes of at most half a square of vectors, those too large for the buffers, factors above
// 4, sources of a factor above 1, every second pixel alone, and planes to entries in order.

#include "kernels.h"
#include "transpose.h"

namespace dsr::DSR_LEVEL {

namespace {

constexpr int64_t SLACK = 8 * LANES;  // floats that whole vectors read or write past the end
static_assert(2 * (MAX_POSITIONS + SLACK) * sizeof(float) <= sizeof(Scratch::floats), "the buffers do not fit");

// Every second element of two vectors.
#if DSR_LANES == 16
inline Vec even(Vec a, Vec b) {
    return Vec{a[0], a[2], a[4], a[6], a[8], a[10], a[12], a[14], b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]};
}
#elif DSR_LANES == 8
inline Vec even(Vec a, Vec b) { return Vec{a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]}; }
#else
inline Vec even(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
#endif

// The positions of a plane in order to its vectors.
void to_strips(const float* positions, int64_t length, float* plane) {
    for (int64_t begin = 0; begin < length; begin += LANES) {
        const int64_t count = length - begin < LANES ? length - begin : LANES;
        Vec square[LANES];
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) square[l] = load(positions + l * length + begin);
        transpose(square);
        if (count == LANES) {
#pragma GCC unroll 16
            for (int v = 0; v < LANES; v++) store(plane + (begin + v) * LANES, square[v]);
        } else {
            for (int v = 0; v < count; v++) store(plane + (begin + v) * LANES, square[v]);
        }
    }
}

// The vectors of a plane to its positions in order.
void from_strips(const float* plane, int64_t length, float* positions) {
    // The last square first, and strips in order, so that what whole vectors write past the end of a strip is
    // overwritten by the strip that it belongs to.
    const int64_t squares = (length + LANES - 1) / LANES;
    for (int64_t s = squares - 1; s >= 0; s--) {
        const int64_t begin = s * LANES, count = length - begin < LANES ? length - begin : LANES;
        Vec square[LANES];
        for (int v = 0; v < LANES; v++) square[v] = v < count ? load(plane + (begin + v) * LANES) : Vec{};
        transpose(square);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) store(positions + l * length + begin, square[l]);
    }
}

// A vector of every step-th float from `from` on; step is 1, 2 or 4, and as many vectors are read.
inline Vec spread(const float* from, int64_t step) {
    if (step == 1) return load(from);
    if (step == 2) return even(load(from), load(from + LANES));
    return even(even(load(from), load(from + LANES)), even(load(from + 2 * LANES), load(from + 3 * LANES)));
}

// Writes `count` floats that lie `step` apart, then zeros up to `width` and to the end of the last vector.
void take(const float* from, const float* end, int64_t step, int64_t count, float* to, int64_t width) {
    Bits lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    int64_t i = 0;
    for (; i < count; i += LANES) {
        const float* here = from + i * step;
        // Near the end of an array of the caller, single floats: whole vectors would read past it.
        if (here + step * LANES <= end) {
            store(to + i, masked(lane < (int32_t)(count - i), spread(here, step)));
        } else {
            store(to + i, Vec{});
            for (int64_t k = i; k < count && k < i + LANES; k++) to[k] = from[k * step];
        }
    }
    for (; i < width; i += LANES) store(to + i, Vec{});
}

void relayout_channel(const void* context, int64_t channel, int thread) {
    const Call& call = *(const Call*)context;
    float *source = scratch_of(call.scratch, thread).floats, *positions = source + MAX_POSITIONS + SLACK;
    const Relayout& op = call.op.relayout;
    const int64_t length = call.op.length, factor = op.factor;
    const float *in = call.source + channel * op.source_step, *end = in + op.source_step;
    if (op.source_length) {
        from_strips(in, op.source_length, source);
        in = source, end = source + MAX_POSITIONS + SLACK;
    }
    float* out = call.out + channel * call.op.phases * call.op.out_stride * LANES;
    for (int64_t a = 0; a < factor; a++)
        for (int64_t b = 0; b < factor; b++) {
            const int64_t columns = (op.width - b + factor - 1) / factor;
            float* row = positions;
            for (int64_t y = a; y < op.height; y += factor, row += op.out_pitch)
                take(in + y * op.source_pitch + b, end, factor, columns, row, op.out_pitch);
            // The grid may have more rows than there are pixels.
            for (; row < positions + length * LANES; row += LANES) store(row, Vec{});
            to_strips(positions, length, out + (a * factor + b) * call.op.out_stride * LANES);
        }
}

// A piece of every phase of one channel at a time: neighbouring pixels go to different phases, so what was read for one
// phase is still in the cache for the next.
constexpr int64_t PIECE = 8 * LANES;

void gather_channel(const Call& call, int64_t channel) {
    const Gather& op = call.op.gather;
    const float* in = call.source + channel * op.source_step;
    for (int64_t begin = 0; begin < op.entries; begin += PIECE) {
        const int64_t end = begin + PIECE < op.entries ? begin + PIECE : op.entries;
        for (int64_t phase = 0; phase < op.phases; phase++) {
            const int32_t* index = op.index + phase * op.entries;
            float* out = call.out + (channel * op.phases + phase) * op.out_step;
            // Four single loads at a time: the gather instruction that a compiler would choose is slower.
            int64_t i = begin;
            for (; i + 4 <= end; i += 4) {
                const float a = in[index[i]], b = in[index[i + 1]], c = in[index[i + 2]], d = in[index[i + 3]];
                out[i] = a, out[i + 1] = b, out[i + 2] = c, out[i + 3] = d;
            }
            for (; i < end; i++) out[i] = in[index[i]];
            if (call.op.mask) {
                // Positions without a pixel point to the first one; here they become zero.
                const int32_t* mask = call.op.mask + phase * op.entries;
                for (int64_t v = begin; v < end; v += LANES) {
                    Bits bits;
                    std::memcpy(&bits, mask + v, sizeof bits);
                    store(out + v, masked(bits, load(out + v)));
                }
            }
        }
    }
}

constexpr int64_t COPIED = 1 << 14;  // floats of one share: 64 KiB

void copy_share(const void* context, int64_t item) {
    const Call& call = *(const Call*)context;
    const int64_t begin = item * COPIED, rest = call.op.copy.entries - begin;
    // A plan of a stranger may copy a piece of memory onto a part of itself.
    std::memmove(call.out + begin, call.source + begin, 4 * (rest < COPIED ? rest : COPIED));
}

}  // namespace

void relayout(const Call& call) { parallel(call.pool, call.op.channels, relayout_channel, &call); }

void gather(const Call& call) { in_shares(call, gather_channel, call.op.gather.channels); }

void copy(const Call& call) {
    parallel(call.pool, (call.op.copy.entries + COPIED - 1) / COPIED, copy_share, &call);
}

}  // namespace dsr::DSR_LEVEL
