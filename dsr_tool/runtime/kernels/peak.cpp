// The most multiply-adds that this processor can do: what the speed of an op is compared with.

#include "clock.h"
#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

constexpr int SUMS = 12;           // an FMA takes 4 or 5 cycles and two begin in each, so 10 of them are on their way
constexpr int64_t STEPS = 20000;   // of each sum in one trial: about 50 microseconds, less than a slice of a scheduler
constexpr int TRIALS = 200;        // the best of these, since other processes may take the core

// Nanoseconds of one trial. The numbers come from outside, and differ, so that every sum has to be computed.
int64_t trial(Vec factor, const float* starts, Vec* result) {
    Vec sums[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sums[i] = splat(starts[i]);
    const int64_t before = now_ns();
    for (int64_t step = 0; step < STEPS; step++) {
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * factor + factor;
    }
    const int64_t after = now_ns();
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) *result += sums[i];
    return after - before;
}

}  // namespace

double peak() {
    volatile float half = 0.5f;  // sums stay finite
    float starts[SUMS];
    for (int i = 0; i < SUMS; i++) starts[i] = half * (float)i;
    Vec result{};
    int64_t best = INT64_MAX;
    for (int i = 0; i < TRIALS; i++) {
        const int64_t nanoseconds = trial(splat(half), starts, &result);
        if (nanoseconds < best) best = nanoseconds;
    }
    volatile float used = result[0];
    (void)used;
    return 2.0 * SUMS * LANES * STEPS / (double)(best > 0 ? best : 1);
}

}  // namespace dsr::DSR_LEVEL
