// The time that passes, for measurements.
#pragma once

#include <time.h>

#include <cstdint>

namespace dsr {

// Nanoseconds since some moment; only differences mean anything.
static inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

}  // namespace dsr
