// The kernels for training share this file: tensors in the blocked layout, and loops over their planes.
//
// A blocked tensor is contiguous (blocks, channels, pixels, lanes): `lanes` images side by side, so that a plane, all
// pixels of one channel in one block, is a run of pixels * lanes floats. Lanes is 4, 8 or 16 in every build, and the
// vectors of the build just run along a plane. The last block may have lanes without an image (padding).
#pragma once

#include "kernels.h"

// These kernels are in the libraries of single levels alone, so they need no namespaces of their own.
using namespace dsr;
using namespace dsr::DSR_LEVEL;

namespace planes {

// Vectors that a loop handles at once, with a sum for each, which hides the latency of additions.
constexpr int WIDE = 4;
constexpr int64_t CHUNK = 16 * WIDE * LANES;  // floats summed in float32 before they are added in float64: 16 a lane
constexpr int64_t SHARE = 16 * 1024;          // floats that are worth asking another thread for

struct Shape {
    int64_t blocks, channels, plane, lanes, images;  // plane: floats of one channel in one block

    int64_t start(int64_t block, int64_t channel) const { return (block * channels + channel) * plane; }
    // Floats to the plane of the same channel in the next block; from the last block to the next channel in the first.
    int64_t ahead(int64_t block, int64_t channel) const {
        if (block + 1 < blocks) return channels * plane;
        return channel + 1 < channels ? plane - block * channels * plane : 0;
    }
    int64_t values() const { return plane / lanes * images; }  // of a channel
    int64_t images_in(int64_t block) const {
        const int64_t left = images - block * lanes;
        return left < lanes ? left : lanes;
    }
};

// The vectors of a pixel: as wide as the build's, or as the pixel where that is narrower.
template <int WIDTH> struct Wide {
    typedef float Floats __attribute__((vector_size(4 * WIDTH)));
    typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
    typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

    static Floats load(const float* from) {
        Floats v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
    static Floats select(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }
};

// Calls run(Wide<...>{}) with the widest vectors that a pixel fills.
template <class R> void with_width([[maybe_unused]] int64_t lanes, const R& run) {
#if DSR_LANES >= 16
    if (lanes >= 16) return run(Wide<16>{});
#endif
#if DSR_LANES >= 8
    if (lanes >= 8) return run(Wide<8>{});
#endif
    return run(Wide<4>{});
}

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

// Asks for a cache line that is needed soon: the processor does not see where the next plane lies.
inline void prefetch(const float* line) { __builtin_prefetch(line, 0, 2); }

// Calls f(i, sum, k, left) for each vector of the floats from begin to end: i is its first float, sum < WIDE the sum
// that it goes to, k < WIDE its place in a Mask, and left the floats up to the end, or LANES where that is more.
template <class F> __attribute__((always_inline)) inline void sweep(int64_t begin, int64_t end, F f) {
    int64_t i = begin;
    for (; i + WIDE * LANES <= end; i += WIDE * LANES) {
#pragma GCC unroll 4
        for (int k = 0; k < WIDE; k++) f(i + k * LANES, k, k, LANES);
    }
    for (int k = 0; i < end; k++, i += LANES) f(i, 0, k, end - i);
}

// A Mask tells the images in a plane from the lanes of padding, which the last block may have.
struct Mask {
    Bits bits[WIDE];

    Mask(int64_t lanes, int64_t images) {
        for (int i = 0; i < WIDE * LANES; i++) bits[i / LANES][i % LANES] = i % lanes < images ? -1 : 0;
    }

    // Keeps what is an image in vector k, and zeroes the rest and what lies past the end of a plane.
    Vec keep(Vec v, int k, int64_t left) const {
        v = masked(bits[k], v);
        if (left >= LANES) return v;
        Bits lane;
        for (int l = 0; l < LANES; l++) lane[l] = l;
        return masked(lane < (int32_t)left, v);
    }
};

// The masks of a tensor's blocks.
struct Masks {
    Mask all, last;
    int64_t blocks;

    explicit Masks(const Shape& shape)
        : all(shape.lanes, shape.lanes), last(shape.lanes, shape.images_in(shape.blocks - 1)), blocks(shape.blocks) {}
    const Mask& of(int64_t block) const { return block + 1 < blocks ? all : last; }
};

// Sums of one channel and of products with it, one for each lane of a vector. A chunk is summed in float32.
struct Sums {
    double sums[LANES] = {}, products[LANES] = {};

    void add(const Vec* s, const Vec* p) {
        const Vec a = (s[0] + s[1]) + (s[2] + s[3]), b = (p[0] + p[1]) + (p[2] + p[3]);
        for (int l = 0; l < LANES; l++) sums[l] += a[l];
        for (int l = 0; l < LANES; l++) products[l] += b[l];
    }

    static double total(const double* lanes) {
        double part[4] = {};
        for (int l = 0; l < LANES; l += 4)
            for (int i = 0; i < 4; i++) part[i] += lanes[l + i];
        return (part[0] + part[1]) + (part[2] + part[3]);
    }
    double sum() const { return total(sums); }
    double product() const { return total(products); }
};

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
