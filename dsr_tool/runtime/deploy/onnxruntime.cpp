// The operator SparsePlan of ONNX Runtime: its first input is a plan file, the others are the inputs of the plan.
//
// `dsr-tool export --to onnx --encoding native` writes models of this one node. A session keeps the bytes of the plan
// as an initializer, which is read in place when the session is made; outputs are computed into the session's own
// tensors. Of a plan, runs follow each other, as dsr.h says.

#include "onnxruntime.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "include/dsr.h"

namespace dsr::ort {

namespace {

constexpr char DOMAIN[] = "dsr_tool";
constexpr char NAME[] = "SparsePlan";
constexpr char THREADS[] = "threads";  // attribute of the node
// Entries of the configuration of a session. No function tells the number of its threads, so there is one for that.
constexpr char THREADS_ENTRY[] = "dsr_tool.threads";
constexpr char REGISTERED_ENTRY[] = "dsr_tool.registered";
constexpr int64_t MOST_THREADS = 256;

// The operator, as it was registered for sessions with one number of threads.
struct Registered {
    Operator op;          // first, since ONNX Runtime hands out its address
    const Table* table;   // a process may have several copies of ONNX Runtime
    int64_t threads;      // 0: the attribute of the node decides
    Domain* domain;
    Registered* next;
};

struct Kernel {
    Api api;
    dsr_plan* plan;
};

// A status with our sentence.
Status* failed(const Api& api, ErrorCode code, const char* sentence) {
    char message[600];
    snprintf(message, sizeof message, "dsr-tool: %s", sentence);
    return api.CreateStatus(code, message);
}

// Type, shape and data of a tensor.
Status* describe(const Api& api, const Value* value, dsr_tensor& tensor) {
    ShapeInfo* info = nullptr;
    if (Status* status = api.GetTensorTypeAndShape(value, &info)) return status;
    ElementType type = UNDEFINED;
    size_t rank = 0;
    Status* status = api.GetTensorElementType(info, &type);
    if (!status) status = api.GetDimensionsCount(info, &rank);
    // Of more axes, dsr_run names the rank alone.
    if (!status && rank <= DSR_MAX_RANK) status = api.GetDimensions(info, tensor.shape, rank);
    api.ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    tensor.type = type == FLOAT ? (int32_t)DSR_FLOAT32 : -(int32_t)type;
    tensor.rank = (int32_t)rank;
    return api.GetTensorMutableData(const_cast<Value*>(value), &tensor.data);
}

// The bytes of the first input, which must be known when the session is made.
Status* plan_of(const Api& api, const KernelInfo* info, const void** bytes, size_t* size) {
    int is_constant = 0;
    const Value* value = nullptr;
    if (Status* status = api.KernelInfoGetConstantInput_tensor(info, 0, &is_constant, &value)) return status;
    if (!is_constant || !value)
        return failed(api, INVALID_ARGUMENT, "the plan of SparsePlan is computed; make it an initializer.");
    ShapeInfo* shape = nullptr;
    if (Status* status = api.GetTensorTypeAndShape(value, &shape)) return status;
    Status* status = api.GetTensorShapeElementCount(shape, size);
    api.ReleaseTensorTypeAndShapeInfo(shape);
    void* data = nullptr;
    if (!status) status = api.GetTensorMutableData(const_cast<Value*>(value), &data);
    *bytes = data;
    return status;
}

// Whether a node has as many inputs and outputs as its plan.
Status* check_counts(const Api& api, const KernelInfo* info, const dsr_plan* plan) {
    size_t inputs = 0, outputs = 0;
    if (Status* status = api.KernelInfo_GetInputCount(info, &inputs)) return status;
    if (Status* status = api.KernelInfo_GetOutputCount(info, &outputs)) return status;
    if (inputs == (size_t)dsr_input_count(plan) + 1 && outputs == (size_t)dsr_output_count(plan)) return nullptr;
    char sentence[200];
    snprintf(sentence, sizeof sentence,
             "the node SparsePlan has %zu inputs and %zu outputs; its plan takes %d and the plan itself, and computes "
             "%d.",
             inputs, outputs, dsr_input_count(plan), dsr_output_count(plan));
    return failed(api, INVALID_ARGUMENT, sentence);
}

// Threads of a kernel: those of the session's entry, else of the node's attribute, else 1.
int64_t threads_of(const Api& api, const Operator* op, const KernelInfo* info) {
    int64_t threads = ((const Registered*)op)->threads;
    if (threads) return threads;
    if (Status* absent = api.KernelInfoGetAttribute_int64(info, THREADS, &threads)) {
        api.ReleaseStatus(absent);
        return 1;
    }
    // Out of the range of dsr_open_memory, which then names the range.
    return threads < 0 || threads > MOST_THREADS ? MOST_THREADS + 1 : threads;
}

Status* create(const Operator* op, const Table* table, const KernelInfo* info, void** out) {
    const Api api(table);
    const void* bytes = nullptr;
    size_t size = 0;
    if (Status* status = plan_of(api, info, &bytes, &size)) return status;
    dsr_plan* plan = dsr_open_memory(bytes, size, (int32_t)threads_of(api, op, info));
    if (!plan) return failed(api, FAIL, dsr_last_error());
    Status* status = check_counts(api, info, plan);
    void* memory = status ? nullptr : malloc(sizeof(Kernel));
    if (!memory) {
        dsr_close(&plan);
        return status ? status : failed(api, FAIL, "there is no memory for a kernel.");
    }
    *out = new (memory) Kernel{api, plan};
    return nullptr;
}

void destroy(void* kernel) {
    if (kernel) dsr_close(&((Kernel*)kernel)->plan);
    free(kernel);
}

// Runs the plan from the tensors of the session into tensors of the session.
Status* run(const Kernel& kernel, KernelContext* context, dsr_tensor* inputs, int32_t input_count, dsr_tensor* outputs,
            int32_t output_count) {
    const Api& api = kernel.api;
    for (int32_t i = 0; i < input_count; i++) {
        const Value* value = nullptr;
        if (Status* status = api.KernelContext_GetInput(context, (size_t)i + 1, &value)) return status;
        if (!value) return failed(api, INVALID_ARGUMENT, "an input of SparsePlan is left out; the plan needs all.");
        if (Status* status = describe(api, value, inputs[i])) return status;
    }
    for (int32_t i = 0; i < output_count; i++) {
        outputs[i] = dsr_output(kernel.plan, i);
        Value* value = nullptr;
        const size_t rank = (size_t)outputs[i].rank;
        if (Status* status = api.KernelContext_GetOutput(context, (size_t)i, outputs[i].shape, rank, &value))
            return status;
        if (!value) return failed(api, INVALID_ARGUMENT, "an output of SparsePlan has no name; the plan computes all.");
        if (Status* status = api.GetTensorMutableData(value, &outputs[i].data)) return status;
    }
    const int32_t result = dsr_run(kernel.plan, inputs, input_count, outputs, output_count);
    if (result == DSR_OK) return nullptr;
    return failed(api, result == DSR_BAD_ARGUMENT ? INVALID_ARGUMENT : FAIL, dsr_last_error());
}

Status* compute(void* self, KernelContext* context) {
    const Kernel& kernel = *(const Kernel*)self;
    const int32_t inputs = dsr_input_count(kernel.plan), outputs = dsr_output_count(kernel.plan);
    // Of this call alone, since several may go on at once.
    dsr_tensor* tensors = (dsr_tensor*)calloc((size_t)inputs + (size_t)outputs, sizeof(dsr_tensor));
    if (!tensors) return failed(kernel.api, FAIL, "there is no memory for the list of inputs.");
    Status* status = run(kernel, context, tensors, inputs, tensors + inputs, outputs);
    free(tensors);
    return status;
}

void describe_operator(Operator& op) {
    op.version = VERSION;
    op.name = [](const Operator*) { return (const char*)NAME; };
    op.provider = [](const Operator*) { return (const char*)nullptr; };
    op.input_count = [](const Operator*) { return (size_t)2; };
    op.input_type = [](const Operator*, size_t index) { return index ? FLOAT : UINT8; };
    op.input_characteristic = [](const Operator*, size_t index) { return index ? VARIADIC : REQUIRED; };
    op.input_memory = [](const Operator*, size_t) { return DEFAULT; };
    op.output_count = [](const Operator*) { return (size_t)1; };
    op.output_type = [](const Operator*, size_t) { return FLOAT; };
    op.output_characteristic = [](const Operator*, size_t) { return VARIADIC; };
    op.least_inputs = op.same_inputs = op.least_outputs = op.same_outputs = [](const Operator*) { return 1; };
    // The functions without a status are never called where those with one are known.
    op.create_kernel = nullptr;
    op.compute = nullptr;
    op.create_kernel_or_fail = create;
    op.compute_or_fail = compute;
    op.destroy = destroy;
}

// The number of threads of the session's entry; 0 if it has none.
Status* threads_entry(const Api& api, const SessionOptions* options, int64_t* threads) {
    int has = 0;
    if (Status* status = api.HasSessionConfigEntry(options, THREADS_ENTRY, &has)) return status;
    *threads = 0;
    if (!has) return nullptr;
    char text[32] = "";
    size_t size = sizeof text;
    Status* status = api.GetSessionConfigEntry(options, THREADS_ENTRY, text, &size);
    if (status) api.ReleaseStatus(status);  // longer than any number
    char* end = text;
    const long long value = status ? 0 : strtoll(text, &end, 10);
    if (value < 1 || value > MOST_THREADS || *end) {
        char sentence[200];
        snprintf(sentence, sizeof sentence,
                 "the session's entry %s is '%s', which is not in [1, %lld]; give one for each core.",
                 THREADS_ENTRY, text, (long long)MOST_THREADS);
        return failed(api, INVALID_ARGUMENT, sentence);
    }
    *threads = value;
    return nullptr;
}

Registered* all_registered = nullptr;
pthread_mutex_t lock_of_registered = PTHREAD_MUTEX_INITIALIZER;

// The domain with the operator. Sessions keep its address, so it stays for as long as the library is loaded.
Status* domain_of(const Api& api, const Table* table, int64_t threads, Domain** out) {
    for (Registered* one = all_registered; one; one = one->next)
        if (one->table == table && one->threads == threads) return *out = one->domain, nullptr;
    Registered* made = (Registered*)calloc(1, sizeof(Registered));
    if (!made) return failed(api, FAIL, "there is no memory for an operator.");
    describe_operator(made->op);
    made->table = table;
    made->threads = threads;
    Status* status = api.CreateCustomOpDomain(DOMAIN, &made->domain);
    if (!status && (status = api.CustomOpDomain_Add(made->domain, &made->op))) api.ReleaseCustomOpDomain(made->domain);
    if (status) return free(made), status;
    made->next = all_registered;
    all_registered = made;
    *out = made->domain;
    return nullptr;
}

Status* register_in(const Api& api, const Table* table, SessionOptions* options) {
    // A second registration, also by another copy of this library, would be a second operator of the same name.
    int has = 0;
    if (Status* status = api.HasSessionConfigEntry(options, REGISTERED_ENTRY, &has)) return status;
    if (has) return nullptr;
    int64_t threads = 0;
    if (Status* status = threads_entry(api, options, &threads)) return status;
    Domain* domain = nullptr;
    pthread_mutex_lock(&lock_of_registered);
    Status* status = domain_of(api, table, threads, &domain);
    pthread_mutex_unlock(&lock_of_registered);
    if (!status) status = api.AddCustomOpDomain(options, domain);
    return status ? status : api.AddSessionConfigEntry(options, REGISTERED_ENTRY, "1");
}

}  // namespace

// What ONNX Runtime calls when a session's options name this library.
extern "C" DSR_API Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
    if (const Table* table = base->get_api(VERSION)) return register_in(Api(table), table, options);
    // Every release has the first version, whose table begins with the function that makes a status.
    Status* (*create_status)(ErrorCode, const char*) = *(Status * (*const*)(ErrorCode, const char*)) base->get_api(1);
    char sentence[200];
    snprintf(sentence, sizeof sentence,
             "dsr-tool: ONNX Runtime %.40s is too old for SparsePlan; install 1.16 or newer.",
             base->get_version_string());
    return create_status(FAIL, sentence);
}

}  // namespace dsr::ort
