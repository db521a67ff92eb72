// Pools share this file: pixels as vectors.
//
// A pixel is a run of lanes, so every window is computed for all of them at once, and planes are independent: threads
// share them. The backward passes go over the outputs in order and add to the inputs of each window, which are still in
// the first-level cache from the window before.
#pragma once

#include "train_planes.h"

namespace planes {

// Floats of one plane before and after the pool.
template <class P> int64_t inputs(const P& pool) { return pool.rows.inputs * pool.columns.inputs * pool.lanes; }
template <class P> int64_t outputs(const P& pool) { return pool.rows.outputs * pool.columns.outputs * pool.lanes; }

}  // namespace planes
