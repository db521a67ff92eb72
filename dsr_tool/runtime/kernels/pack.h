// Weights as work records, in the order in which the kernels read them (Entry, Block and Part in ops.def).
//
// A record is a value and the distance, in vectors, from the output to the input that it multiplies. Records are
// grouped by part (output channels of one thread, one phase), block (input channels that fit in the cache together)
// and output channel. Within a block the channels are sorted by their number of records: a loop that runs as often as
// the one before is predicted by the processor.
//
// Recipes and weights may come from files of strangers. Whatever numbers they hold, nothing is read outside of the
// arrays that Recipe and Weight describe, nothing is written outside of those that Sizes describes, and each packed
// offset and row is one that the recipe allows. Memory that is packed must not change meanwhile.
#pragma once

#include "ops.h"

namespace dsr {

// Checks a recipe and its weight, and computes the sizes of the arrays that `fill` needs. After REACH, `sizes.reach` is
// the distance that is too large.
Fault measure(const Recipe& recipe, const Weight& weight, Sizes& sizes);

// Packs a weight into arrays of the sizes that `measure` has returned for it. They are incomplete after a fault.
Fault fill(const Recipe& recipe, const Weight& weight, const Sizes& sizes, const Packed& packed);

// How threads share one op of SPMM.
struct Share {
    int64_t tile;   // vectors of a tile
    int64_t parts;  // parts of the output channels
};

// Returns the shares that give all threads equal work. Sums do not depend on them. Each part reads the whole input
// again, so threads share the tiles of a plane where there are enough of them.
//
//     length   vectors of a plane of the output
//     tile     vectors of a tile for one thread
//     phases   phases of the output
Share share(int64_t threads, int64_t length, int64_t tile, int64_t phases);

}  // namespace dsr
