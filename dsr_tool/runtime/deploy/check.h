// What the kernels take on trust, checked: every float that an op reads or writes lies in its buffer, and every table
// has the entries that its op reads.
#pragma once

#include "../kernels/ops.h"
#include "memory.h"

namespace dsr {

// A table of a plan file: its entries follow this head, and ops hold their address.
struct TableHead {
    int64_t count, type;  // type: a TableType
};

enum TableType : int64_t { FLOATS = 0, INT32S = 1, INT64S = 2 };

// The buffers of one segment and the vectors of one level.
struct Space {
    int64_t lanes, widest, widest_dense;
    int64_t buffers;         // the arena included
    const int64_t* entries;  // floats of each buffer: of the arena, and of one piece of each array
};

// What an op with weights reads: how far its records reach, in units of its source (vectors; floats in GEMV).
struct Reach {
    int64_t low, high;    // the lowest and the highest that is read for output 0
    int64_t rows;         // output channels
    int64_t phases;       // phases of the output
    int64_t values;       // weights in the order of use
    bool coded, dense;    // codes of a grid; weights with their zeros
};

// Returns whether an op is safe to run; if not, `problem` has the reason.
//
//   reach   of the packed weight of SPMM and GEMV; null for other kinds
bool check_op(const Op& op, const Space& space, const Reach* reach, Problem& problem);

}  // namespace dsr
