// What all levels of a plan file share: texts, inputs and outputs, weights, and tables of numbers.
#pragma once

#include "../kernels/pack.h"
#include "check.h"
#include "memory.h"
#include "plan_file.h"
#include "reader.h"

namespace dsr {

struct StoredTable {
    int64_t type, count;
    const void* data;
};

// A weight of the file: all entries, a bit each, or the distances between active entries as bytes.
enum WeightForm : int64_t { FULL = 0, BITS = 1, DISTANCES = 2 };

struct StoredWeight {
    Weight weight;
    int64_t form, distance_bytes;
    const uint8_t* distances;
    Array<uint8_t> bits;  // made of the distances
};

struct Stored {
    PlanFile& plan;
    Problem& problem;
    Array<StoredTable> tables;
    Array<StoredWeight> weights;

    Stored(PlanFile& plan_, Problem& problem_) : plan(plan_), problem(problem_) {}

    // Reads it all, and leaves the file at its levels. Returns false with a problem.
    bool read(Reader& file);

    // A weight with a mask of bits, if it has a mask; null, with a problem, for a mask that does not fit.
    const Weight* weight(int64_t number);

    // The entries of a table behind their TableHead, copied when they are used first; null, with a problem, if there is
    // none of that number and type.
    const void* table(int64_t number, int64_t type);

    bool damaged(const char* what) { return problem.say("the plan is damaged: %s; export it again.", what); }

   private:
    bool read_head(Reader& file);
    bool read_values(Reader& file, Array<Value>& values);
    bool read_weights(Reader& file);
    bool read_tables(Reader& file);
};

}  // namespace dsr
