// The levels of kernels that a library holds, and which of them this processor runs.

#include "levels.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// The build names its levels, fastest first: DSR_LEVELS is X(avx512) X(avx2) X(baseline), say.
#define X(level) \
    namespace dsr::level { extern const Level LEVEL; }
DSR_LEVELS
#undef X

namespace dsr {

namespace {

const Level* const ALL[] = {
#define X(level) &level::LEVEL,
    DSR_LEVELS
#undef X
};

#if defined(__x86_64__)
// Whether the system saves the registers in these bits of the state on a task switch.
bool saves(uint32_t bits) {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

struct Leaf {
    uint32_t a = 0, b = 0, c = 0, d = 0;

    explicit Leaf(uint32_t number) { __get_cpuid_count(number, 0, &a, &b, &c, &d); }
};

// Levels 3 and 4 of the x86-64 psABI. What belongs to level 2 is in every processor with AVX2.
bool has_v3() {
    const Leaf one(1), seven(7), extended(0x80000001);
    constexpr uint32_t FMA = 1u << 12, MOVBE = 1u << 22, OSXSAVE = 1u << 27, AVX = 1u << 28, F16C = 1u << 29;
    constexpr uint32_t ONE = FMA | MOVBE | OSXSAVE | AVX | F16C, BMI1 = 1u << 3, AVX2 = 1u << 5, BMI2 = 1u << 8;
    constexpr uint32_t LZCNT = 1u << 5, SEVEN = BMI1 | AVX2 | BMI2;
    return (one.c & ONE) == ONE && (seven.b & SEVEN) == SEVEN && (extended.c & LZCNT) && saves(6);
}

bool has_v4() {
    const Leaf seven(7);
    constexpr uint32_t F = 1u << 16, DQ = 1u << 17, CD = 1u << 28, BW = 1u << 30, VL = 1u << 31;
    constexpr uint32_t SEVEN = F | DQ | CD | BW | VL;
    return has_v3() && (seven.b & SEVEN) == SEVEN && saves(0xE6);
}
#endif

}  // namespace

const Level* const* all_levels(int* count) {
    *count = sizeof ALL / sizeof *ALL;
    return ALL;
}

// The level of a number, and whether it runs here; null past the last one. For the writer of plan files, which makes
// plans for levels that do not run here too.
extern "C" const Level* dsr_level(int32_t number, int32_t* runs) {
    int count;
    const Level* const* levels = all_levels(&count);
    if (number < 0 || number >= count) return nullptr;
    *runs = runs_here(levels[number]->name);
    return levels[number];
}

bool runs_here([[maybe_unused]] const char* level) {
#if defined(__x86_64__)
    if (!strcmp(level, "avx512")) return has_v4();
    if (!strcmp(level, "avx2")) return has_v3();
#endif
    return true;  // the other levels are what every processor of their machine runs
}

}  // namespace dsr
