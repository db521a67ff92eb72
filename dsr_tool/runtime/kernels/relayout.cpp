// Pixels from rows, or from planes on one grid, to planes on another: by transposing squares of vectors, where the
// gather in planes.cpp moves one pixel at a time.

#include "kernels.h"

namespace {

constexpr int64_t MOST_PLACES = 1 << 14;  // of a plane; fast/layouts.py has the same number
constexpr int64_t SLACK = 8 * LANES;      // floats that whole vectors read or write for nothing

// The first or last halves of two vectors, element by element in turn; and every second element of both.
#if DSR_LANES == 16
inline Vec low(Vec a, Vec b) {
    return Vec{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
}
inline Vec high(Vec a, Vec b) {
    return Vec{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
               a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
}
inline Vec even(Vec a, Vec b) {
    return Vec{a[0], a[2], a[4], a[6], a[8], a[10], a[12], a[14], b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]};
}
#elif DSR_LANES == 8
inline Vec low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]}; }
inline Vec high(Vec a, Vec b) { return Vec{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]}; }
inline Vec even(Vec a, Vec b) { return Vec{a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]}; }
#else
inline Vec low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
inline Vec high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
inline Vec even(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
#endif

// A square of vectors, rows for columns: each step deals the rows out to two halves.
inline void transpose(Vec* square) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        Vec dealt[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            dealt[2 * i] = low(square[i], square[i + LANES / 2]);
            dealt[2 * i + 1] = high(square[i], square[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = dealt[i];
    }
}

// The places of a plane in order to its vectors.
void to_strips(const float* places, int64_t length, float* plane) {
    for (int64_t begin = 0; begin < length; begin += LANES) {
        const int64_t count = length - begin < LANES ? length - begin : LANES;
        Vec square[LANES];
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) square[l] = load(places + l * length + begin);
        transpose(square);
        if (count == LANES) {
#pragma GCC unroll 16
            for (int v = 0; v < LANES; v++) store(plane + (begin + v) * LANES, square[v]);
        } else {
            for (int v = 0; v < count; v++) store(plane + (begin + v) * LANES, square[v]);
        }
    }
}

// The vectors of a plane to its places in order.
void from_strips(const float* plane, int64_t length, float* places) {
    // The last square first, and strips in order, so that what whole vectors write past the end of a strip is
    // overwritten by the strip that it belongs to.
    const int64_t squares = (length + LANES - 1) / LANES;
    for (int64_t s = squares - 1; s >= 0; s--) {
        const int64_t begin = s * LANES, count = length - begin < LANES ? length - begin : LANES;
        Vec square[LANES];
        for (int v = 0; v < LANES; v++) square[v] = v < count ? load(plane + (begin + v) * LANES) : Vec{};
        transpose(square);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) store(places + l * length + begin, square[l]);
    }
}

// Vector i of every step-th float, which may read up to `step` vectors.
inline Vec spread(const float* from, int64_t step) {
    if (step == 1) return load(from);
    if (step == 2) return even(load(from), load(from + LANES));
    return even(even(load(from), load(from + LANES)), even(load(from + 2 * LANES), load(from + 3 * LANES)));
}

// `count` floats, `step` apart; then zeros up to `width`, and as many more as a vector has.
void take(const float* from, const float* end, int64_t step, int64_t count, float* to, int64_t width) {
    Bits lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    int64_t i = 0;
    for (; i < count; i += LANES) {
        const float* here = from + i * step;
        if (here + step * LANES <= end) {
            store(to + i, masked(lane < (int32_t)(count - i), spread(here, step)));
        } else {
            store(to + i, Vec{});
            for (int64_t k = i; k < count && k < i + LANES; k++) to[k] = from[k * step];
        }
    }
    for (; i < width; i += LANES) store(to + i, Vec{});
}

struct Work {
    const Operation& op;
    const float* in;
    float* out;
};

void regrid_channel(const void* context, int64_t channel) {
    static thread_local float source[MOST_PLACES + SLACK], places[MOST_PLACES + SLACK];
    const Work& work = *(const Work*)context;
    const Operation& op = work.op;
    const int32_t length = op.index[0], pitch = op.index[1], factor = op.index[2];
    const int32_t height = op.index[3], width = op.index[4], out_pitch = op.index[5];
    const float *in = work.in + channel * op.in_stride, *end = in + op.in_stride;
    if (length) {
        from_strips(in, length, source);
        in = source, end = source + MOST_PLACES + SLACK;
    }
    for (int a = 0; a < factor; a++)
        for (int b = 0; b < factor; b++) {
            const int64_t columns = (width - b + factor - 1) / factor;
            float* row = places;
            for (int y = a; y < height; y += factor, row += out_pitch)
                take(in + (int64_t)y * pitch + b, end, factor, columns, row, out_pitch);
            for (; row < places + op.length * LANES; row += LANES) store(row, Vec{});
            to_strips(places, op.length, work.out + (channel * op.phases + a * factor + b) * op.inner);
        }
}

}  // namespace

void regrid(const Operation& op, const float* in, float* out, Pool* pool) {
    const Work work{op, in, out};
    parallel(pool, op.channels, regrid_channel, &work);
}
