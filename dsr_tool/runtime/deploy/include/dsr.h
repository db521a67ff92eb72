/* dsr.h: runs a plan file of dsr-tool (`dsr-tool export MODEL_DIR -o model.dsrplan`) from C or C++.
 *
 *     dsr_plan *plan = dsr_open("model.dsrplan", 1);
 *     if (!plan) return fail(dsr_last_error());
 *     dsr_tensor x = dsr_input(plan, 0), y = dsr_output(plan, 0);
 *     x.data = pixels, y.data = scores;
 *     if (dsr_run(plan, &x, 1, &y, 1)) return fail(dsr_last_error());
 *     dsr_close(&plan);
 *
 * Functions that fail return NULL or a number other than DSR_OK, and dsr_last_error() says why in one sentence. Nothing
 * is printed and nothing aborts. The library has no state but that sentence. Handles are independent of each other; one
 * handle may be used by several threads, whose runs follow each other. A forked process may go on with its handles.
 */
#ifndef DSR_H
#define DSR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define DSR_API __attribute__((visibility("default")))
#else
#define DSR_API
#endif

enum { DSR_OK = 0, DSR_BAD_ARGUMENT = 1 }; /* results of dsr_run */
enum { DSR_FLOAT32 = 1 };                  /* types of entries */
enum { DSR_MAX_RANK = 8 };

/* An array of the caller, or what a plan expects of one. */
typedef struct dsr_tensor {
    void *data;                   /* first entry; NULL from dsr_input and dsr_output */
    int32_t type;                 /* DSR_FLOAT32 */
    int32_t rank;                 /* number of axes, at most DSR_MAX_RANK */
    int64_t shape[DSR_MAX_RANK];  /* entries along each axis; the first axis is the batch */
    const int64_t *strides;       /* entries from one index of an axis to the next; NULL where there are no gaps */
    const char *name;             /* name in the model; dsr_run does not read it */
} dsr_tensor;

typedef struct dsr_plan dsr_plan;

/* Opens a plan file, or a copy of one in memory, for a number of threads (1 to 256). The file is checked whole before
 * anything of it is used, and it is not needed afterwards. */
DSR_API dsr_plan *dsr_open(const char *path, int32_t threads);
DSR_API dsr_plan *dsr_open_memory(const void *bytes, size_t size, int32_t threads);

/* The number of inputs and outputs, and what each of them must be; rank 0 if there is no such one. */
DSR_API int32_t dsr_input_count(const dsr_plan *plan);
DSR_API int32_t dsr_output_count(const dsr_plan *plan);
DSR_API dsr_tensor dsr_input(const dsr_plan *plan, int32_t index);
DSR_API dsr_tensor dsr_output(const dsr_plan *plan, int32_t index);

/* A text of the plan; NULL if it has none of that name: "level" (kernels in use), "architecture", "config" (JSON: input
 * shape, preprocessing, labels), "resize", "crop", "mean" and "std" of the preprocessing, "label/0", "label/1", ... */
DSR_API const char *dsr_text(const dsr_plan *plan, const char *name);

/* Computes the outputs. Every array must have the type and shape of the plan, entries in row-major order, no gaps; no
 * output may share memory with another array. */
DSR_API int32_t dsr_run(dsr_plan *plan, const dsr_tensor *inputs, int32_t input_count, const dsr_tensor *outputs,
                        int32_t output_count);

/* Closes a plan and sets the handle to NULL; closing NULL does nothing. No run may be going on. */
DSR_API void dsr_close(dsr_plan **plan);

/* Why the last call that failed in this thread did so. */
DSR_API const char *dsr_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
