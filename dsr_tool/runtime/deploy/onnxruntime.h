// The part of ONNX Runtime's C interface that our operator needs, declared from its documentation.
//
// Functions stand in one table, to which new versions only add rows, so a function is known by its position. Version 16
// is the first in which operators return errors; ONNX Runtime 1.16 and every later release has it.
// tests/runtime/test_ort_declarations.py compares all of this with onnxruntime_c_api.h where that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsr::ort {

constexpr uint32_t VERSION = 16;

// What only ONNX Runtime looks into.
struct Table;
struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;

struct Operator;

enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType : int { UNDEFINED = 0, FLOAT = 1, UINT8 = 2 };
enum Characteristic : int { REQUIRED = 0, VARIADIC = 2 };
enum MemoryType : int { DEFAULT = 0 };

// The functions that are used: FUNCTION(position, result, name, arguments). A function that can fail returns a status,
// which its caller releases; null is success.
#define ORT_FUNCTIONS(FUNCTION)                                                                                    \
    FUNCTION(0, Status*, CreateStatus, (ErrorCode code, const char* message))                                      \
    FUNCTION(26, Status*, CreateCustomOpDomain, (const char* name, Domain** out))                                  \
    FUNCTION(27, Status*, CustomOpDomain_Add, (Domain* domain, const Operator* op))                                \
    FUNCTION(28, Status*, AddCustomOpDomain, (SessionOptions* options, Domain* domain))                            \
    FUNCTION(51, Status*, GetTensorMutableData, (Value* value, void** out))                                        \
    FUNCTION(60, Status*, GetTensorElementType, (const ShapeInfo* info, ElementType* out))                         \
    FUNCTION(61, Status*, GetDimensionsCount, (const ShapeInfo* info, size_t* out))                                \
    FUNCTION(62, Status*, GetDimensions, (const ShapeInfo* info, int64_t* out, size_t count))                      \
    FUNCTION(64, Status*, GetTensorShapeElementCount, (const ShapeInfo* info, size_t* out))                        \
    FUNCTION(65, Status*, GetTensorTypeAndShape, (const Value* value, ShapeInfo** out))                            \
    FUNCTION(86, Status*, KernelInfoGetAttribute_int64, (const KernelInfo* info, const char* name, int64_t* out))  \
    FUNCTION(90, Status*, KernelContext_GetInput, (const KernelContext* context, size_t index, const Value** out)) \
    FUNCTION(91, Status*, KernelContext_GetOutput,                                                                 \
             (KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** out))               \
    FUNCTION(93, void, ReleaseStatus, (Status* status))                                                            \
    FUNCTION(99, void, ReleaseTensorTypeAndShapeInfo, (ShapeInfo* info))                                           \
    FUNCTION(101, void, ReleaseCustomOpDomain, (Domain* domain))                                                   \
    FUNCTION(130, Status*, AddSessionConfigEntry, (SessionOptions* options, const char* key, const char* value))   \
    FUNCTION(230, Status*, KernelInfo_GetInputCount, (const KernelInfo* info, size_t* out))                        \
    FUNCTION(231, Status*, KernelInfo_GetOutputCount, (const KernelInfo* info, size_t* out))                       \
    FUNCTION(237, Status*, HasSessionConfigEntry, (const SessionOptions* options, const char* key, int* out))      \
    FUNCTION(238, Status*, GetSessionConfigEntry,                                                                  \
             (const SessionOptions* options, const char* key, char* out, size_t* size))                            \
    FUNCTION(249, Status*, KernelInfoGetConstantInput_tensor,                                                      \
             (const KernelInfo* info, size_t index, int* is_constant, const Value** out))

// Those functions, taken from a table.
struct Api {
#define FUNCTION(position, result, name, arguments) result(*name) arguments;
    ORT_FUNCTIONS(FUNCTION)
#undef FUNCTION

    explicit Api(const Table* table) {
#define FUNCTION(position, result, name, arguments) name = ((result(* const*) arguments)table)[position];
        ORT_FUNCTIONS(FUNCTION)
#undef FUNCTION
    }
};

// Where a process gets a table; null for a version that ONNX Runtime does not have.
struct ApiBase {
    const Table* (*get_api)(uint32_t version);
    const char* (*get_version_string)();
};

// An operator as ONNX Runtime asks for it: the head of its struct, up to what version 16 reads.
struct Operator {
    uint32_t version;
    void* (*create_kernel)(const Operator* op, const Table* table, const KernelInfo* info);
    const char* (*name)(const Operator* op);
    const char* (*provider)(const Operator* op);  // null is the CPU
    ElementType (*input_type)(const Operator* op, size_t index);
    size_t (*input_count)(const Operator* op);
    ElementType (*output_type)(const Operator* op, size_t index);
    size_t (*output_count)(const Operator* op);
    void (*compute)(void* kernel, KernelContext* context);
    void (*destroy)(void* kernel);
    Characteristic (*input_characteristic)(const Operator* op, size_t index);
    Characteristic (*output_characteristic)(const Operator* op, size_t index);
    MemoryType (*input_memory)(const Operator* op, size_t index);
    int (*least_inputs)(const Operator* op);  // of the variadic input; its type is one if `same` is not 0
    int (*same_inputs)(const Operator* op);
    int (*least_outputs)(const Operator* op);
    int (*same_outputs)(const Operator* op);
    Status* (*create_kernel_or_fail)(const Operator* op, const Table* table, const KernelInfo* info, void** kernel);
    Status* (*compute_or_fail)(void* kernel, KernelContext* context);
};

}  // namespace dsr::ort
