// Ops on rows of entries in order: BROADCAST and REDUCE.
//
// Both read each float once or twice and write it once, so memory is the limit. Rows are independent, so threads share
// them.

#include <cmath>

#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

constexpr int64_t AT_ONCE = 4096;  // floats of an item, at least

struct Items {
    const Call& call;
    int64_t rows;  // of an item
};

// A vector of a row: its next entries, of which `count` exist, or the one that it has.
Vec entries(const float* row, int64_t step, int64_t c, int64_t count) {
    if (!step) return splat(*row);
    if (count == LANES) return load(row + c);
    Vec v{};
    std::memcpy(&v, row + c, 4 * count);
    return v;
}

void broadcast_rows(const void* context, int64_t item) {
    const Items& items = *(const Items*)context;
    const Call& call = items.call;
    const Broadcast& op = call.op.broadcast;
    const int64_t begin = item * items.rows, end = begin + items.rows < op.rows ? begin + items.rows : op.rows;
    for (int64_t r = begin; r < end; r++) {
        const float *a = call.source + op.source_rows[r], *b = call.other + op.other_rows[r];
        float* out = call.out + r * op.columns;
        for (int64_t c = 0; c < op.columns; c += LANES) {
            const int64_t count = op.columns - c < LANES ? op.columns - c : LANES;
            const Vec x = combined(op.how, entries(a, op.source_step, c, count), entries(b, op.other_step, c, count));
            std::memcpy(out + c, &x, 4 * count);
        }
        activate(call.op, out, op.columns);
    }
}

// Sums of 64 vectors each, then the sum of those: a long chain of additions would round more.
void reduce_rows(const void* context, int64_t item) {
    const Items& items = *(const Items*)context;
    const Call& call = items.call;
    const Reduce& op = call.op.reduce;
    const int64_t begin = item * items.rows, end = begin + items.rows < op.rows ? begin + items.rows : op.rows;
    for (int64_t r = begin; r < end; r++) {
        const float* in = call.source + r * op.columns;
        Vec total{};
        for (int64_t first = 0; first < op.columns; first += 64 * LANES) {
            Vec part{};
            for (int64_t c = first; c < op.columns && c < first + 64 * LANES; c += LANES) {
                const Vec x = entries(in, 1, c, op.columns - c < LANES ? op.columns - c : LANES);
                part += op.squares ? x * x : x;
            }
            total += part;
        }
        const float all = sum(total);
        call.out[r] = (op.squares ? std::sqrt(all) : all) * op.factor;
    }
}

void by_items(const Call& call, int64_t rows, int64_t columns, void (*f)(const void*, int64_t)) {
    const Items items{call, columns < AT_ONCE ? AT_ONCE / columns + 1 : 1};
    parallel(call.pool, (rows + items.rows - 1) / items.rows, f, &items);
}

}  // namespace

void broadcast(const Call& call) {
    by_items(call, call.op.broadcast.rows, call.op.broadcast.columns, broadcast_rows);
}

void reduce(const Call& call) { by_items(call, call.op.reduce.rows, call.op.reduce.columns, reduce_rows); }

}  // namespace dsr::DSR_LEVEL
