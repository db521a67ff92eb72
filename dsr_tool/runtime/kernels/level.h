// The name of this build's level: a namespace for everything that depends on the width of vectors.
//
// One library for C programs (deploy/) holds every level of its machine, so no function may have the same name in two
// of them. What does not depend on vectors is in `dsr` itself.
#pragma once

#ifndef DSR_LEVEL
#define DSR_LEVEL plain
#endif

namespace dsr::DSR_LEVEL {}
