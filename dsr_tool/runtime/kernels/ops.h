// The enums and structs of ops.def.
#pragma once

#include <cstdint>

namespace dsr {

enum Kind : int32_t {
#define OP(kind, number, function, line) kind = number,
#include "ops.def"
};

enum Activation : int32_t {
#define ACTIVATION(name, number, line) name = number,
#include "ops.def"
};

enum Combination : int32_t {
#define COMBINATION(name, number, line) name = number,
#include "ops.def"
};

enum class Packing : int32_t {
#define PACKING(name, number, line) name = number,
#include "ops.def"
};

enum class Fault : int32_t {
#define FAULT(name, number, line) name = number,
#include "ops.def"
};

#define LIMIT(name, value, line) constexpr int64_t name = value;
#include "ops.def"

#define STRUCT(name, line) struct name {
#define FIELD(name, type, field, line) type field;
#define END(name) };
#include "ops.def"

// One entry of a plan: the fields that every op has, and the parameters of its kind.
struct Op {
#define COMMON(type, field, line) type field;
#include "ops.def"
    union {
#define PARAMETERS(name, member) name member;
#include "ops.def"
    };
};

}  // namespace dsr
