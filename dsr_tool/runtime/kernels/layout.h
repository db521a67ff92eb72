// The layout of this build, row by row: enums by number, structs by size, fields by offset and size.
//
// Python reads the same table (ops.py) and refuses a library that differs; a plan file holds a checksum of it.
#pragma once

#include <cstddef>

#include "ops.h"

namespace dsr {

struct LayoutRow {
    const char* name;
    int64_t number;  // of a limit or an enum's member; offset of a field; 0 for a struct
    int64_t bytes;   // of a struct or field; 0 for an enum
};

// Ends with a row without a name.
constexpr LayoutRow LAYOUT[] = {
#define LIMIT(name, value, line) {"Limit." #name, name, 0},
#define OP(kind, number, function, line) {"Kind." #kind, kind, 0},
#define ACTIVATION(name, number, line) {"Activation." #name, name, 0},
#define COMBINATION(name, number, line) {"Combination." #name, name, 0},
#define PACKING(name, number, line) {"Packing." #name, number, 0},
#define FAULT(name, number, line) {"Fault." #name, number, 0},
#define STRUCT(name, line) {#name, 0, sizeof(name)},
#define FIELD(name, type, field, line) {#name "." #field, offsetof(name, field), sizeof(name::field)},
#define COMMON(type, field, line) {"Op." #field, offsetof(Op, field), sizeof(Op::field)},
#define PARAMETERS(name, member) {"Op." #member, offsetof(Op, member), sizeof(Op::member)},
#include "ops.def"
    {"Op", 0, sizeof(Op)},
    {nullptr, 0, 0},
};

}  // namespace dsr
