// What the kernels for training share: tensors in the blocked layout, and loops over their planes.
//
// A blocked tensor is contiguous (blocks, channels, pixels, lanes): `lanes` images side by side, so that a plane, all
// pixels of one channel in one block, is a run of pixels * lanes floats. Lanes is 4, 8 or 16 in every build, and the
// vectors of the build just run along a plane. The last block may have lanes without an image (padding).
#pragma once

#include "kernels.h"

namespace planes {

constexpr int WIDE = 4;                       // vectors that a loop handles at once, with a sum for each: hides the additions' latency
constexpr int64_t CHUNK = 16 * WIDE * LANES;  // floats summed in float32 before they are added in float64: 16 a lane
constexpr int64_t SHARE = 16 * 1024;          // floats that are worth asking another thread for

struct Shape {
    int64_t blocks, channels, plane, lanes, images;  // plane: floats of one channel in one block

    int64_t start(int64_t block, int64_t channel) const { return (block * channels + channel) * plane; }
    int64_t images_in(int64_t block) const {
        const int64_t left = images - block * lanes;
        return left < lanes ? left : lanes;
    }
};

// The first `left` floats of a vector, and zeros; a whole vector where left is LANES or more.
inline Vec get(const float* from, int64_t left) {
    if (left >= LANES) return load(from);
    Vec v{};
    std::memcpy(&v, from, 4 * left);
    return v;
}

inline void put(float* to, Vec v, int64_t left) {
    if (left >= LANES) return store(to, v);
    std::memcpy(to, &v, 4 * left);
}

// Calls f(i, k, left) for each vector of the floats from begin to end: i is its first float, k < WIDE its sum, and left
// the floats up to the end, or LANES where that is more.
template <class F> __attribute__((always_inline)) inline void sweep(int64_t begin, int64_t end, F f) {
    int64_t i = begin;
    for (; i + WIDE * LANES <= end; i += WIDE * LANES) {
#pragma GCC unroll 4
        for (int k = 0; k < WIDE; k++) f(i + k * LANES, k, LANES);
    }
#pragma GCC unroll 4
    for (int k = 0; k < WIDE; k++)
        if (i + k * LANES < end) f(i + k * LANES, k, end - i - k * LANES);
}

// Zeroes what is not an image: lanes of padding in the last block, and floats past the end of a plane.
template <bool PADDED> struct Real {
    Bits mask[WIDE];

    explicit Real(int64_t lanes, int64_t images) {
        for (int i = 0; i < WIDE * LANES; i++) mask[i / LANES][i % LANES] = i % lanes < images ? -1 : 0;
    }

    Vec keep(Vec v, int k, int64_t left) const {
        if (PADDED) v = masked(mask[k], v);
        if (left >= LANES) return v;
        Bits lane;
        for (int l = 0; l < LANES; l++) lane[l] = l;
        return masked(lane < (int32_t)left, v);
    }
};

inline double total(const Vec* sums) {
    const Vec v = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double lane[LANES];
    for (int i = 0; i < LANES; i++) lane[i] = v[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

// Calls f(i) for every i below count, each of which touches `floats` floats, in shares that are worth a thread's while.
template <class F> void each(Pool* pool, int64_t count, int64_t floats, const F& f) {
    struct Shares {
        const F& f;
        int64_t count, at_once;
    };
    const Shares shares{f, count, floats < SHARE ? SHARE / (floats + 1) + 1 : 1};
    parallel(
        pool, (count + shares.at_once - 1) / shares.at_once,
        [](const void* context, int64_t item) {
            const Shares& s = *(const Shares*)context;
            const int64_t begin = item * s.at_once, end = begin + s.at_once;
            for (int64_t i = begin; i < (end < s.count ? end : s.count); i++) s.f(i);
        },
        &shares);
}
}  // namespace planes
