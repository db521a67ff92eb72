// A vector of floats, as wide as this build's registers, and the functions of it that networks need.
//
// Vectors are the compiler's own (vector_size), so one source serves AVX-512, AVX2, SSE2 and NEON. Their width must be
// the processor's: gcc lowers wider ones badly.
#pragma once

#include <cstdint>
#include <cstring>

#include "level.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dsr::DSR_LEVEL {

#if defined(__AVX512F__)
#define DSR_LANES 16
#elif defined(__AVX__)
#define DSR_LANES 8
#else
#define DSR_LANES 4
#endif

constexpr int LANES = DSR_LANES;
constexpr int VECTOR_BYTES = 4 * LANES;

typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));

static inline Vec splat(float x) { return x - Vec{}; }

static inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// Whole numbers of 8 bits as floats. gcc 12 widens vectors of bytes entry by entry, on x86 and on aarch64.
static inline Vec load_codes(const int8_t* from) {
#if defined(__AVX512F__)
    const Bits whole = (Bits)_mm512_maskz_cvtepi8_epi32(-1, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    const Bits whole = (Bits)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__SSE2__)
    int32_t codes;
    std::memcpy(&codes, from, sizeof codes);
    // Each code four times in an entry; the shift keeps the topmost, with its sign.
    const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi32_si128(codes), _mm_cvtsi32_si128(codes));
    const Bits whole = (Bits)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
#elif defined(__aarch64__)
    int32_t codes;
    std::memcpy(&codes, from, sizeof codes);
    const Bits whole = (Bits{codes, codes, codes, codes} << Bits{24, 16, 8, 0}) >> 24;
#else
    Bits whole;
    for (int i = 0; i < LANES; i++) whole[i] = from[i];
#endif
    return __builtin_convertvector(whole, Vec);
}

static inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// `a` where the mask is set, else `b`; the mask comes from a comparison or a table of 0 and -1.
static inline Vec select(Bits mask, Vec a, Vec b) { return (Vec)((mask & (Bits)a) | (~mask & (Bits)b)); }

static inline Vec masked(Bits mask, Vec a) { return (Vec)(mask & (Bits)a); }

// Comparisons with NaN are false, so NaN stays NaN.
static inline Vec clip(Vec x, Vec low, Vec high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// Each lane moves to the one above or below, and zero comes in: how strips meet their neighbours in the halo.
#if DSR_LANES == 16
static inline Vec raised(Vec v) {
    const Vec o{};
    return Vec{o[0], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}
static inline Vec lowered(Vec v) {
    const Vec o{};
    return Vec{v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], o[0]};
}
#elif DSR_LANES == 8
static inline Vec raised(Vec v) { return Vec{0, v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; }
static inline Vec lowered(Vec v) { return Vec{v[1], v[2], v[3], v[4], v[5], v[6], v[7], 0}; }
#else
static inline Vec raised(Vec v) { return Vec{0, v[0], v[1], v[2]}; }
static inline Vec lowered(Vec v) { return Vec{v[1], v[2], v[3], 0}; }
#endif

static inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline float largest(Vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most || v[i] != v[i] ? v[i] : most;
    return most;
}

// e^x, wrong by at most two units in the last place: 2^n e^r with |r| <= ln 2 / 2, and e^r by its Taylor series to
// degree 7.
static inline Vec exponential(Vec x) {
    // Past these, the result is 0 or infinity in float.
    x = clip(x, splat(-87.3f), splat(88.7f));
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    Vec shifted = x * 1.44269504f + shifter;
    Vec n = shifted - shifter;
    Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    Vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // Half of n twice, since 2^128 itself is not a float.
    Bits whole = (Bits)shifted - (Bits)shifter;
    Bits half = whole >> 1;
    return p * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
}

static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

static inline Vec hyperbolic_tangent(Vec x) { return 1.0f - 2.0f / (1.0f + exponential(x + x)); }

// The error function, wrong by at most 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
static inline Vec error_function(Vec x) {
    Bits sign = (Bits)x & INT32_MIN;
    Vec a = (Vec)((Bits)x & INT32_MAX);
    Vec t = 1.0f / (1.0f + 0.3275911f * a);
    Vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return (Vec)((Bits)(1.0f - p * t * exponential(-(a * a))) | sign);
}

}  // namespace dsr::DSR_LEVEL
