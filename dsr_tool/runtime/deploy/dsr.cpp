// The functions of dsr.h: a handle is a plan that was read and checked, its memory, and the threads that run it.

#include "include/dsr.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <new>

#include "plan_file.h"

using namespace dsr;

namespace {

thread_local char last_error[640] = "";  // a sentence of a Problem, and 200 bytes of a path

// Keeps the sentence for dsr_last_error. Returns `code`.
template <class T, class... A>
T failed(T code, const char* format, A... arguments) {
    snprintf(last_error, sizeof last_error, format, arguments...);
    return code;
}

// A sentence without values; clang wants a literal format.
template <class T>
T failed(T code, const char* sentence) {
    return failed(code, "%s", sentence);
}

}  // namespace

struct dsr_plan {
    PlanFile file;
    int threads = 1;
    pthread_mutex_t lock;
    std::atomic<pid_t> process{0};  // whose threads and lock these are; 0 while a forked process makes its own
    Pool* pool = nullptr;
    Array<float> arena;
    Array<float> scratch;  // of each thread
};

namespace {

// A forked process has none of its parent's threads, and a lock that may be held by one of them, so it starts with new
// ones. The old ones are not freed, since that waits for the threads.
void start_anew_after_fork(dsr_plan* plan) {
    const pid_t here = getpid();
    for (pid_t owner; (owner = plan->process.load(std::memory_order_acquire)) != here;) {
        // Of several threads of the forked process, one makes them and the others wait.
        if (!owner || !plan->process.compare_exchange_strong(owner, 0)) continue;
        pthread_mutex_init(&plan->lock, nullptr);
        plan->pool = new_pool(plan->threads);
        plan->process.store(here, std::memory_order_release);
    }
}

struct Locked {
    pthread_mutex_t* lock;

    explicit Locked(pthread_mutex_t* lock_) : lock(lock_) { pthread_mutex_lock(lock); }
    ~Locked() { pthread_mutex_unlock(lock); }
};

dsr_tensor described(const Array<Value>* values, int32_t index) {
    dsr_tensor tensor{};
    if (!values || index < 0 || index >= values->count) return tensor;
    const Value& value = (*values)[index];
    tensor.type = DSR_FLOAT32;
    tensor.rank = (int32_t)value.rank;
    tensor.name = value.name;
    for (int64_t axis = 0; axis < value.rank; axis++) tensor.shape[axis] = value.shape[axis];
    return tensor;
}

void write_shape(const int64_t* shape, int64_t rank, char* text, size_t size) {
    size_t used = 0;
    text[0] = 0;
    for (int64_t axis = 0; axis < rank && used < size; axis++)
        used += snprintf(text + used, size - used, "%s%lld", axis ? ", " : "", (long long)shape[axis]);
}

// Whether an array of the caller is what the plan expects.
bool fits(const Value& value, const dsr_tensor& tensor, const char* what) {
    if (!tensor.data)
        return failed(false, "%s '%.100s' has no data; set tensor.data to its first entry.", what, value.name);
    if ((uintptr_t)tensor.data % alignof(float))
        return failed(false, "%s '%.100s' has its data at no multiple of %d bytes; give the address of a float.", what,
                      value.name, (int)alignof(float));
    if (tensor.type != DSR_FLOAT32)
        return failed(false, "%s '%.100s' has type %d; give float32 entries and set type to DSR_FLOAT32 (%d).",
                      what, value.name, tensor.type, DSR_FLOAT32);
    bool equal = tensor.rank == value.rank;
    for (int64_t axis = 0; equal && axis < value.rank; axis++) equal = tensor.shape[axis] == value.shape[axis];
    if (!equal) {
        char given[200], expected[200];
        const bool known = tensor.rank >= 0 && tensor.rank <= DSR_MAX_RANK;
        write_shape(tensor.shape, known ? tensor.rank : 0, given, sizeof given);
        write_shape(value.shape, value.rank, expected, sizeof expected);
        return failed(false, "%s '%.100s' has rank %d and shape (%s); give an array of shape (%s).", what,
                      value.name, tensor.rank, given, expected);
    }
    int64_t step = 1;
    for (int64_t axis = value.rank - 1; tensor.strides && axis >= 0; step *= value.shape[axis--])
        if (tensor.strides[axis] != step && value.shape[axis] > 1)
            return failed(false, "%s '%.100s' has a stride of %lld on axis %lld, not %lld; copy it to row-major order.",
                          what, value.name, (long long)tensor.strides[axis], (long long)axis, (long long)step);
    return true;
}

bool all_fit(const Array<Value>& values, const dsr_tensor* tensors, int32_t count, const char* what) {
    if (count != values.count)
        return failed(false, "the number of %ss is %d; give %lld, as many as the plan has.", what, count,
                      (long long)values.count);
    if (!tensors) return failed(false, "the array of %ss is NULL; give a dsr_tensor for each %s.", what, what);
    for (int64_t i = 0; i < values.count; i++)
        if (!fits(values[i], tensors[i], what)) return false;
    return true;
}

// Whether the entries of two arrays share memory.
bool overlap(const dsr_tensor& one, const Value& of_one, const dsr_tensor& two, const Value& of_two) {
    const uintptr_t a = (uintptr_t)one.data, b = (uintptr_t)two.data;
    return a < b + of_two.entries * sizeof(float) && b < a + of_one.entries * sizeof(float);
}

// Outputs are written while inputs are still read, so no output may lie in another array.
bool all_apart(const PlanFile& file, const dsr_tensor* inputs, const dsr_tensor* outputs) {
    for (int64_t o = 0; o < file.outputs.count; o++) {
        const Value& output = file.outputs[o];
        const char* other = nullptr;
        for (int64_t i = 0; i < file.inputs.count; i++)
            if (overlap(outputs[o], output, inputs[i], file.inputs[i])) other = file.inputs[i].name;
        for (int64_t i = 0; i < o; i++)
            if (overlap(outputs[o], output, outputs[i], file.outputs[i])) other = file.outputs[i].name;
        if (other)
            return failed(false, "output '%.100s' shares memory with '%.100s'; give each array memory of its own.",
                          output.name, other);
    }
    return true;
}

// Asks for large pages, as sessions do: planes lie far apart, and each would take a page of its own to find.
void prefer_large_pages([[maybe_unused]] const Array<float>& array) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)array.data + page - 1) / page * page;
    const uintptr_t last = (uintptr_t)(array.data + array.count) / page * page;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Reads `size` bytes of an open file, or says why not.
bool read_whole(int file, const char* path, uint8_t* bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        const ssize_t some = read(file, bytes + done, size - done);
        if (some < 0 && errno == EINTR) continue;
        if (some <= 0)
            return failed(false, "plan '%.200s' cannot be read: %s; copy the file again.", path,
                          some ? strerror(errno) : "it became shorter");
        done += some;
    }
    return true;
}

// The bytes of a file; null, with a sentence, if it cannot be read.
uint8_t* read_file(const char* path, size_t* size) {
    // A pipe without a writer is not waited for, and no program that another thread starts inherits the file.
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat about;
    uint8_t* bytes = nullptr;
    if (file < 0 || fstat(file, &about)) {
        failed(0, "plan '%.200s' cannot be opened: %s; give the path of a plan file.", path, strerror(errno));
    } else if (!S_ISREG(about.st_mode)) {
        failed(0, "plan '%.200s' is no regular file; give the path of a plan file, or its bytes to dsr_open_memory.",
               path);
    } else if (!(bytes = (uint8_t*)malloc((size_t)about.st_size + 1))) {
        failed(0, "plan '%.200s' has %lld bytes, for which there is no memory; use a machine with more.", path,
               (long long)about.st_size);
    } else if (!read_whole(file, path, bytes, *size = (size_t)about.st_size)) {
        free(bytes);
        bytes = nullptr;
    }
    if (file >= 0) close(file);
    return bytes;
}

}  // namespace

extern "C" {

dsr_plan* dsr_open(const char* path, int32_t threads) {
    if (!path) return failed(nullptr, "the path of the plan is NULL; give the path of a plan file.");
    size_t size = 0;
    uint8_t* bytes = read_file(path, &size);
    if (!bytes) return nullptr;
    dsr_plan* plan = dsr_open_memory(bytes, size, threads);
    free(bytes);
    if (!plan) {
        char why[sizeof last_error];
        memcpy(why, last_error, sizeof why);
        failed(0, "plan '%.200s' cannot be used: %.400s", path, why);
    }
    return plan;
}

dsr_plan* dsr_open_memory(const void* bytes, size_t size, int32_t threads) {
    if (!bytes) return failed(nullptr, "the address of the plan is NULL; give the bytes of a plan file.");
    if (threads < 1 || threads > 256)
        return failed(nullptr, "threads %d is not in [1, 256]; give one for each core.", threads);
    Problem problem;
    // Not the operators of C++, which need its library.
    void* memory = malloc(sizeof(dsr_plan));
    dsr_plan* plan = memory ? new (memory) dsr_plan : nullptr;
    if (!plan) {
        problem.no_memory(sizeof *plan);
    } else {
        pthread_mutex_init(&plan->lock, nullptr);
        plan->process = getpid();
        plan->threads = threads;
        if (plan->file.read(bytes, (int64_t)size, threads, problem) &&
            plan->arena.make(plan->file.arena_floats, problem) &&
            plan->scratch.make(threads * SCRATCH_FLOATS, problem))
            prefer_large_pages(plan->arena);
    }
    if (problem) {
        dsr_close(&plan);
        return failed(nullptr, "%s", problem.text);
    }
    plan->pool = new_pool(threads);
    return plan;
}

int32_t dsr_input_count(const dsr_plan* plan) { return plan ? (int32_t)plan->file.inputs.count : 0; }

int32_t dsr_output_count(const dsr_plan* plan) { return plan ? (int32_t)plan->file.outputs.count : 0; }

dsr_tensor dsr_input(const dsr_plan* plan, int32_t index) {
    return described(plan ? &plan->file.inputs : nullptr, index);
}

dsr_tensor dsr_output(const dsr_plan* plan, int32_t index) {
    return described(plan ? &plan->file.outputs : nullptr, index);
}

const char* dsr_text(const dsr_plan* plan, const char* name) {
    if (!plan || !name) return nullptr;
    if (!strcmp(name, "level")) return plan->file.level->name;
    for (const Text& text : plan->file.texts)
        if (!strcmp(text.name, name)) return text.value;
    return nullptr;
}

int32_t dsr_run(dsr_plan* plan, const dsr_tensor* inputs, int32_t input_count, const dsr_tensor* outputs,
                int32_t output_count) {
    if (!plan) return failed(DSR_BAD_ARGUMENT, "the plan is NULL; open one with dsr_open.");
    PlanFile& file = plan->file;
    if (!all_fit(file.inputs, inputs, input_count, "input") ||
        !all_fit(file.outputs, outputs, output_count, "output") || !all_apart(file, inputs, outputs))
        return DSR_BAD_ARGUMENT;
    start_anew_after_fork(plan);
    const Locked locked(&plan->lock);
    for (const Step& step : file.steps) {
        float* starts[MAX_BUFFERS] = {plan->arena.data};
        for (int64_t b = 0; b < step.arrays.count; b++) {
            Exchanged& array = file.exchanged[step.arrays[b]];
            starts[b + 1] = array.role == 0   ? array.own.data
                            : array.role == 1 ? (float*)inputs[array.index].data
                                              : (float*)outputs[array.index].data;
        }
        file.level->run(file.ops.data + step.first_op, step.op_count, starts, step.steps.data, step.steps.count,
                        step.images, plan->pool, plan->scratch.data);
    }
    return DSR_OK;
}

void dsr_close(dsr_plan** plan) {
    if (!plan || !*plan) return;
    // Of a parent's threads nothing is left in a forked process, so there is nothing to wait for.
    if ((*plan)->process == getpid()) free_pool((*plan)->pool);
    pthread_mutex_destroy(&(*plan)->lock);
    (*plan)->~dsr_plan();
    free(*plan);
    *plan = nullptr;
}

const char* dsr_last_error(void) { return last_error; }
}
