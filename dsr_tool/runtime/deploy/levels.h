// The levels of kernels that a library holds, and which of them this processor runs.
#pragma once

#include "../kernels/kernels.h"

namespace dsr {

// All levels of the library, fastest first, `count` of them.
const Level* const* all_levels(int* count);

// Whether this processor and its operating system run a level.
bool runs_here(const char* level);

}  // namespace dsr
