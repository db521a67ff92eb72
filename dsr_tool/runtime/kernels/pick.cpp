// Entries that change their place and nothing else: PICK by two tables, CONSTANT from a table of its own.
//
// A transpose, a slice, a pad, a roll, an expansion or a shuffle of channels is, for each entry of the result, an entry
// of the source; so is any series of them. The address of that entry is the sum of one that belongs to some axes of the
// result and one that belongs to the others, in whatever layout the source lies: in planes, a channel and a pixel. PICK
// adds the two, and copies runs where neighbours stay neighbours.

#include "kernels.h"

namespace dsr::DSR_LEVEL {

namespace {

// Outer and inner entries that are picked together. Whichever of the two walks through far memory meets the cache lines
// of the other again while they are in the first-level cache: 16 x 32 of them are at most 32 KiB.
constexpr int64_t OUTERS = 16, INNERS = 32;
constexpr int64_t LONG_RUN = 64;  // floats from which one run at a time is enough for an item

struct Tiles {
    const Call& call;
    int64_t inners, across;  // inner entries of a tile, and tiles side by side
};

void copy_run(const float* from, float* to, int64_t run, float factor) {
    int64_t j = 0;
    if (factor == 1) {
        for (; j + LANES <= run; j += LANES) store(to + j, load(from + j));
        for (; j < run; j++) to[j] = from[j];
    } else {
        for (; j + LANES <= run; j += LANES) store(to + j, load(from + j) * factor);
        for (; j < run; j++) to[j] = from[j] * factor;
    }
}

void pick_row(const Pick& op, const float* from, const int32_t* inner, int64_t count, float* to) {
    if (op.run == 1) {
        for (int64_t i = 0; i < count; i++) to[i] = inner[i] < 0 ? op.fill : from[inner[i]] * op.factor;
        return;
    }
    for (int64_t i = 0; i < count; i++, to += op.run) {
        if (inner[i] >= 0)
            copy_run(from + inner[i], to, op.run, op.factor);
        else
            for (int64_t j = 0; j < op.run; j++) to[j] = op.fill;
    }
}

void pick_tile(const void* context, int64_t item) {
    const Tiles& tiles = *(const Tiles*)context;
    const Pick& op = tiles.call.op.pick;
    const int64_t first = item / tiles.across * OUTERS, begin = item % tiles.across * tiles.inners;
    const int64_t last = first + OUTERS < op.outer_count ? first + OUTERS : op.outer_count;
    const int64_t rest = op.inner_count - begin, count = rest < tiles.inners ? rest : tiles.inners;
    for (int64_t phase = 0; phase < op.phases; phase++)
        for (int64_t o = first; o < last; o++) {
            float* to = tiles.call.out + op.out_first + (o * op.phases + phase) * op.out_step + begin * op.run;
            if (op.outer[o] < 0)
                for (int64_t j = 0; j < count * op.run; j++) to[j] = op.fill;
            else
                pick_row(op, tiles.call.source + op.outer[o], op.inner + phase * op.inner_count + begin, count, to);
        }
}

void constant_plane(const Call& call, int64_t plane) {
    const int64_t floats = call.op.length * LANES;
    std::memcpy(call.out + plane * call.op.out_stride * LANES, call.op.constant.values + plane * floats, 4 * floats);
}

}  // namespace

void pick(const Call& call) {
    const Pick& op = call.op.pick;
    const int64_t inners = op.run < LONG_RUN ? INNERS : 1;
    const Tiles tiles{call, inners, (op.inner_count + inners - 1) / inners};
    parallel(call.pool, (op.outer_count + OUTERS - 1) / OUTERS * tiles.across, pick_tile, &tiles);
}

void constant(const Call& call) { in_shares(call, constant_plane, call.op.channels * call.op.phases); }

}  // namespace dsr::DSR_LEVEL
