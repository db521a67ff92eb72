// The fields of ops that hold addresses: in a plan file they hold numbers of tables.
#pragma once

#include <strings.h>

#include <cstddef>

#include "../kernels/ops.h"
#include "check.h"

namespace dsr {

// A pointer field of an op: where it lies, and the type of its table; -1 if it points into a packed weight.
struct PointerField {
    const char* owner;  // the struct; null for fields that every op has
    int64_t offset;     // bytes from the start of the struct, or of the op
    int64_t type;
};

template <class T>
struct PointerType {
    static constexpr int64_t type = -2;  // no pointer
};
template <class T>
struct PointerType<const T*> {
    static constexpr int64_t type = -1;
};
template <>
struct PointerType<const float*> {
    static constexpr int64_t type = FLOATS;
};
template <>
struct PointerType<const int32_t*> {
    static constexpr int64_t type = INT32S;
};
template <>
struct PointerType<const int64_t*> {
    static constexpr int64_t type = INT64S;
};

constexpr PointerField FIELDS[] = {
#define FIELD(name, kind, field, line) {#name, offsetof(name, field), PointerType<kind>::type},
#define COMMON(kind, field, line) {nullptr, offsetof(Op, field), PointerType<kind>::type},
#include "../kernels/ops.def"
};

// The struct of parameters of a kind, and where it lies in an op; null for a kind without parameters.
inline const char* parameters_of(int64_t kind, int64_t* offset) {
    const char* wanted = "";
    switch (kind) {
#define OP(name, number, function, line) \
    case number: wanted = #name; break;
#include "../kernels/ops.def"
    }
    // The member of `Op` is the kind in lower case.
#define PARAMETERS(name, member) \
    if (!strcasecmp(wanted, #member)) return *offset = offsetof(Op, member), #name;
#include "../kernels/ops.def"
    return nullptr;
}

}  // namespace dsr
