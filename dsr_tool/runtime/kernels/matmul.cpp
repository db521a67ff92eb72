// MATMUL: products of two computed matrices, a batch of them: the scores and the sums of attention.
//
// Every row and column of both matrices is found by tables of distances, so the heads of attention are read from where
// a linear layer wrote them, transposed or not, in planes or in order. That would be slow if each entry were read once
// for each use. So both sides are packed: DEPTH entries of the sums at a time, panels of HEIGHT rows on the left and of
// WIDTH columns on the right, in the order in which the innermost loop reads them, factors applied.
//
// The innermost loop holds HEIGHT x WIDTH sums in registers: for each k it loads two vectors of the right panel and
// broadcasts HEIGHT entries of the left one. The panel on the right stays in the first-level cache, those on the left
// in the second.

#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

#if DSR_LANES == 16 || defined(__aarch64__)
constexpr int HEIGHT = 12;  // of 32 registers
#else
constexpr int HEIGHT = 6;  // of 16 registers
#endif
constexpr int WIDTH = 2 * LANES;
constexpr int64_t DEPTH = 256;  // entries of each sum that are packed at a time
constexpr int64_t ROWS = 240;   // rows on the left that are packed at a time: panels of 6 and of 12

struct Panels {
    float left[ROWS * DEPTH];
    float right[DEPTH * WIDTH];
};
static_assert(sizeof(Panels) <= sizeof(Scratch::floats), "the panels do not fit into the scratch of a thread");

struct Products {
    const Call& call;
    int64_t blocks;  // of ROWS rows of each result
};

// A matrix: an entry is `first` + rows[i] + columns[j].
struct Matrix {
    const float* first;
    const int64_t *rows, *columns;
    float factor;
};

bool in_order(const int64_t* steps, int64_t count) {
    for (int64_t i = 1; i < count; i++)
        if (steps[i] != steps[0] + i) return false;
    return true;
}

// `count` rows of the left matrix from its first one on, HEIGHT at a time.
void pack_left(const Matrix& left, int64_t count, int64_t depth, float* to) {
    for (int64_t r = 0; r < count; r += HEIGHT) {
        // The last row stands for those past it. Their sums are computed, and not stored.
        const float* rows[HEIGHT];
#pragma GCC unroll 12
        for (int64_t i = 0; i < HEIGHT; i++) rows[i] = left.first + left.rows[r + i < count ? r + i : count - 1];
        for (int64_t k = 0; k < depth; k++, to += HEIGHT) {
            const int64_t column = left.columns[k];
#pragma GCC unroll 12
            for (int64_t i = 0; i < HEIGHT; i++) to[i] = rows[i][column] * left.factor;
        }
    }
}

// `count` columns of the right matrix from its first one on; columns past the last one are zeros.
//
//   wide, deep   it lies in order along its rows, or along its columns
void pack_right(const Matrix& right, int64_t count, int64_t depth, bool wide, bool deep, float* to) {
    if (count < WIDTH) std::memset(to, 0, sizeof(float) * depth * WIDTH);
    if (wide && count == WIDTH) {
        for (int64_t k = 0; k < depth; k++) {
            const float* from = right.first + right.rows[k] + right.columns[0];
            store(to + k * WIDTH, load(from) * right.factor);
            store(to + k * WIDTH + LANES, load(from + LANES) * right.factor);
        }
    } else if (deep) {
        // Along the columns, since that is how they lie.
        for (int64_t j = 0; j < count; j++) {
            const float* from = right.first + right.columns[j] + right.rows[0];
            for (int64_t k = 0; k < depth; k++) to[k * WIDTH + j] = from[k] * right.factor;
        }
    } else {
        for (int64_t k = 0; k < depth; k++)
            for (int64_t j = 0; j < count; j++)
                to[k * WIDTH + j] = right.first[right.rows[k] + right.columns[j]] * right.factor;
    }
}

// The sums of one tile over one block of the depth.
void multiply(const float* left, const float* right, int64_t depth, float* tile) {
    Vec sums[HEIGHT][2] = {};
    for (int64_t k = 0; k < depth; k++, left += HEIGHT, right += WIDTH) {
        const Vec a = load(right), b = load(right + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < HEIGHT; i++) {
            const Vec x = splat(left[i]);
            sums[i][0] += x * a;
            sums[i][1] += x * b;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < HEIGHT; i++) {
        store(tile + i * WIDTH, sums[i][0]);
        store(tile + i * WIDTH + LANES, sums[i][1]);
    }
}

// Adds one tile to what the result holds, or begins with it; `addend` is null where nothing else is added.
void put(const float* tile, int64_t height, int64_t width, int64_t columns, bool begins, const float* addend,
         float* out) {
    for (int64_t i = 0; i < height; i++, tile += WIDTH, out += columns) {
        const float* extra = addend ? addend + i * columns : nullptr;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) {
            Vec sum = load(tile + j);
            if (!begins) sum += load(out + j);
            if (extra) sum += load(extra + j);
            store(out + j, sum);
        }
        for (; j < width; j++) out[j] = (begins ? tile[j] : out[j] + tile[j]) + (extra ? extra[j] : 0.0f);
    }
}

// Item i is a block of rows of one product of the batch.
__attribute__((noinline)) void multiply_rows(const void* context, int64_t item, Panels& panels) {
    const Products& products = *(const Products*)context;
    const Call& call = products.call;
    const Matmul& op = call.op.matmul;
    const int64_t batch = item / products.blocks, first = item % products.blocks * ROWS;
    const int64_t rows = op.rows - first < ROWS ? op.rows - first : ROWS;
    Matrix left{call.source, op.source_rows + batch * op.source_rows_step + first,
                op.source_depth + batch * op.source_depth_step, op.source_factor};
    Matrix right{call.other, op.other_depth + batch * op.other_depth_step,
                 op.other_columns + batch * op.other_columns_step, op.other_factor};
    const int64_t* columns = right.columns;
    const bool wide = in_order(columns, op.columns), deep = in_order(right.rows, op.depth);
    float* out = call.out + (batch * op.rows + first) * op.columns;
    float tile[HEIGHT * WIDTH];
    for (int64_t start = 0; start < op.depth; start += DEPTH, left.columns += DEPTH, right.rows += DEPTH) {
        const int64_t depth = op.depth - start < DEPTH ? op.depth - start : DEPTH;
        const bool ends = start + depth == op.depth;
        const float* addend = ends && op.addend_count ? op.addend + op.addend_batch[batch] + first * op.columns : nullptr;
        pack_left(left, rows, depth, panels.left);
        for (int64_t j = 0; j < op.columns; j += WIDTH) {
            const int64_t width = op.columns - j < WIDTH ? op.columns - j : WIDTH;
            right.columns = columns + j;
            pack_right(right, width, depth, wide, deep, panels.right);
            for (int64_t r = 0; r < rows; r += HEIGHT) {
                multiply(panels.left + r * depth, panels.right, depth, tile);
                put(tile, rows - r < HEIGHT ? rows - r : HEIGHT, width, op.columns, start == 0,
                    addend ? addend + r * op.columns + j : nullptr, out + r * op.columns + j);
            }
        }
    }
}

void multiply_block(const void* context, int64_t item, int thread) {
    float* scratch = ((const Products*)context)->call.scratch;
    multiply_rows(context, item, *(Panels*)scratch_of(scratch, thread).floats);
}

}  // namespace

void matmul(const Call& call) {
    const Matmul& op = call.op.matmul;
    const Products products{call, (op.rows + ROWS - 1) / ROWS};
    parallel(call.pool, op.batches * products.blocks, multiply_block, &products);
}

}  // namespace dsr::DSR_LEVEL
