// Squares of vectors whose rows and columns change places, for vectors of 4 floats up to those of the build.
#pragma once

#include "vectors.h"

namespace dsr::DSR_LEVEL {

typedef float Vec4 __attribute__((vector_size(16)));
#if DSR_LANES >= 8
typedef float Vec8 __attribute__((vector_size(32)));
#endif
#if DSR_LANES >= 16
typedef float Vec16 __attribute__((vector_size(64)));
#endif

// The first or last halves of two vectors, element by element in turn.
inline Vec4 low(Vec4 a, Vec4 b) { return Vec4{a[0], b[0], a[1], b[1]}; }
inline Vec4 high(Vec4 a, Vec4 b) { return Vec4{a[2], b[2], a[3], b[3]}; }
#if DSR_LANES >= 8
inline Vec8 low(Vec8 a, Vec8 b) { return Vec8{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]}; }
inline Vec8 high(Vec8 a, Vec8 b) { return Vec8{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]}; }
#endif
#if DSR_LANES >= 16
inline Vec16 low(Vec16 a, Vec16 b) {
    return Vec16{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
}
inline Vec16 high(Vec16 a, Vec16 b) {
    return Vec16{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
                 a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
}
#endif

// Turns the rows of a square into its columns, in log2 of its side steps of shuffles: each deals the rows out to two
// halves.
template <class V> __attribute__((always_inline)) inline void transpose(V* square) {
    constexpr int SIDE = sizeof(V) / 4;
#pragma GCC unroll 4
    for (int step = 1; step < SIDE; step *= 2) {
        V dealt[SIDE];
#pragma GCC unroll 8
        for (int i = 0; i < SIDE / 2; i++) {
            dealt[2 * i] = low(square[i], square[i + SIDE / 2]);
            dealt[2 * i + 1] = high(square[i], square[i + SIDE / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) square[i] = dealt[i];
    }
}

}  // namespace dsr::DSR_LEVEL
