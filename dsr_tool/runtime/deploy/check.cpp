// The checks of check.h, kind by kind, from the comments of ops.def and the loops of the kernels.

#include "check.h"

#include <initializer_list>

namespace dsr {

namespace {

// Wide enough for products of three fields, which `Check::number` keeps below 2^40 each.
typedef __int128 Wide;
constexpr int64_t MOST = INT64_C(1) << 40;

// The checks of one op; `good` is false after the first that failed.
struct Check {
    const Op& op;
    const Space& space;
    const Reach* reach;
    Problem& problem;
    bool good = true;
    Wide lanes;

    Check(const Op& op_, const Space& space_, const Reach* reach_, Problem& fault_)
        : op(op_), space(space_), reach(reach_), problem(fault_), lanes(space_.lanes) {}

    void require(bool holds, const char* what) {
        if (holds || !good) return;
        good = false;
        problem.say("the plan is damaged: %s of an op of kind %d is out of range; export it again.", what, op.kind);
    }
    // A field as a number of the arithmetic here.
    Wide number(int64_t value, int64_t low, const char* what) {
        require(value >= low && value <= MOST, what);
        return good ? value : low;
    }
    // Floats [low, high) from the address of an operand lie in its buffer.
    void inside(int32_t buffer, int64_t offset, Wide low, Wide high, const char* what) {
        require(buffer >= 0 && buffer < space.buffers && offset >= -MOST && offset <= MOST, what);
        if (good) require(offset + low >= 0 && offset + high <= space.entries[buffer] && low <= high, what);
    }
    void source(Wide low, Wide high) { inside(op.source_buffer, op.source_offset, low, high, "the input"); }
    void other(Wide low, Wide high) { inside(op.other_buffer, op.other_offset, low, high, "the second input"); }
    void out(Wide low, Wide high) { inside(op.out_buffer, op.out_offset, low, high, "the result"); }

    // A table has at least `least` entries of a type.
    void table(const void* data, TableType type, Wide least, const char* what) {
        require(data != nullptr, what);
        if (!good) return;
        const TableHead& head = ((const TableHead*)data)[-1];
        require(head.type == type && head.count >= least, what);
    }

    struct Extremes {
        Wide low, high;
    };
    // The smallest and the largest of `count` entries of a table, which has them.
    static Extremes extremes(const int32_t* data, Wide count) {
        Extremes found{data[0], data[0]};
        for (int64_t i = 1; i < (int64_t)count; i++) {
            found.low = data[i] < found.low ? data[i] : found.low;
            found.high = data[i] > found.high ? data[i] : found.high;
        }
        return found;
    }

    // Floats from the first of `count` planes to the end of the last. Planes may not overlap: a few floats of memory
    // could be any amount of work.
    Wide span(Wide count, Wide stride, Wide length) {
        require(count == 1 || stride >= length, "the stride");
        return ((count - 1) * stride + length) * lanes;
    }

    Wide channels() { return number(op.channels, 1, "channels"); }
    Wide phases() { return number(op.phases, 1, "phases"); }
    Wide length() { return number(op.length, 1, "length"); }
    Wide planes() { return channels() * phases(); }

    // The result as planes, with its halo, which every kind may have.
    void out_planes() {
        const Wide before = number(op.halo_before, 0, "halo"), after = number(op.halo_after, 0, "halo");
        out(-before * lanes, span(planes(), number(op.out_stride, 0, "stride"), length() + after));
    }
    void halo() {
        if (op.halo_before || op.halo_after) out_planes();
    }
    void mask() {
        if (op.mask) table(op.mask, INT32S, phases() * length() * lanes, "the mask");
    }
    void source_planes() { source(0, span(planes(), number(op.source_stride, 0, "stride"), length())); }
    void other_planes() { other(0, span(planes(), number(op.other_stride, 0, "stride"), length())); }

    void weights(const float* scales, const float* bias, Wide rows) {
        require(reach && reach->rows == rows, "the weight");
        if (!good) return;
        table(bias, FLOATS, rows, "the bias");
        if (reach->coded) table(scales, FLOATS, rows, "the scales");
    }

    void spmm() {
        weights(op.spmm.scales, op.spmm.bias, channels());
        if (!good) return;
        require(reach->phases == op.phases, "phases");
        const int64_t widest = reach->dense ? space.widest_dense : space.widest;
        require(op.spmm.tile >= 1 && op.spmm.tile <= widest, "the tile");
        // Converted codes go to a buffer of this size, with one more vector.
        const bool converts = op.spmm.convert != 0;
        require(!converts || (reach->coded && reach->values <= MAX_CONVERTED), "the number of codes");
        source(reach->low * lanes, (reach->high + length()) * lanes);
        if (op.other_buffer >= 0) other_planes();
        out_planes();
        mask();
    }
    void gemv() {
        weights(op.gemv.scales, op.gemv.bias, number(op.gemv.rows, 1, "rows"));
        if (!good) return;
        source(reach->low, (Wide)reach->high + 1);
        if (op.other_buffer >= 0) other(0, op.gemv.rows);
        out(0, op.gemv.rows);
        halo();
    }
    void max_pool() {
        const MaxPool& p = op.max_pool;
        const Wide taps = number(p.taps_per_phase, 1, "taps");
        table(p.taps, INT32S, phases() * taps, "the taps");
        if (!good) return;
        const auto [low, high] = extremes(p.taps, phases() * taps);
        const Wide step = number(p.source_phases, 1, "phases") * number(op.source_stride, 0, "stride");
        source(low * lanes, ((channels() - 1) * step + high + length()) * lanes);
        out_planes();
        mask();
    }
    void gather() {
        const Gather& p = op.gather;
        const Wide planes_of = number(p.phases, 1, "phases"), entries = number(p.entries, 1, "entries");
        const Wide moved = number(p.channels, 1, "channels");
        table(p.index, INT32S, planes_of * entries, "the index");
        if (!good) return;
        const auto [low, high] = extremes(p.index, planes_of * entries);
        require(moved * planes_of == 1 || p.out_step >= p.entries, "the step");
        source(low, (moved - 1) * number(p.source_step, 0, "step") + high + 1);
        // A mask is applied a vector at a time.
        if (op.mask) require(p.entries % space.lanes == 0, "entries");
        if (op.mask) table(op.mask, INT32S, planes_of * entries, "the mask");
        out(0, (moved * planes_of - 1) * number(p.out_step, 0, "step") + entries);
        halo();
    }
    void relayout() {
        const Relayout& p = op.relayout;
        const Wide factor = number(p.factor, 1, "the factor"), height = number(p.height, 1, "height");
        const Wide width = number(p.width, 1, "width"), pitch = number(p.source_pitch, 1, "the pitch");
        const Wide own = number(p.source_length, 0, "length"), out_pitch = number(p.out_pitch, 1, "the pitch");
        const Wide step = number(p.source_step, 0, "step");
        require(factor <= 4 && factor != 3, "the factor");
        require(op.phases == factor * factor, "phases");
        // Both buffers of a thread have this size.
        require(own * lanes <= MAX_POSITIONS && length() * lanes <= MAX_POSITIONS, "length");
        if (!good) return;
        const Wide rows = (height + factor - 1) / factor, columns = (width + factor - 1) / factor;
        require(columns <= out_pitch && rows * out_pitch <= length() * lanes, "the pitch");
        require((height - 1) * pitch + width <= (own ? own * lanes : step), "the pitch");
        source(0, own ? (channels() - 1) * step + own * lanes : channels() * step);
        out_planes();
    }
    void combine() {
        require(op.combine.how >= ADD && op.combine.how <= FIRST, "the combination");
        source_planes();
        if (op.combine.how != FIRST) other_planes();
        // The kernel steps through a second input that is not there as well.
        require(op.combine.how != FIRST || op.other_stride == 0, "the stride");
        out_planes();
        mask();
    }
    void scale() {
        source_planes();
        other(0, channels());
        out_planes();
        mask();
    }
    void mean() {
        const Wide count = number(op.mean.channels, 1, "channels");
        const Wide planes_of = number(op.mean.source_phases, 1, "phases");
        const Wide of_plane = number(op.mean.source_length, 1, "length");
        source(0, span(count * planes_of, number(op.source_stride, 0, "stride"), of_plane));
        out(0, count);
        halo();
    }
    void from_rows() {
        const Wide rows = number(op.from_rows.rows, 1, "rows"), features = number(op.from_rows.features, 1, "features");
        source(0, rows * features);
        out(0, span(features, number(op.out_stride, 0, "stride"), length()));
        halo();
    }
    void to_rows() {
        const Wide rows = number(op.to_rows.rows, 1, "rows"), features = number(op.to_rows.features, 1, "features");
        const Wide of_plane = number(op.to_rows.source_length, 1, "length");
        require(rows <= of_plane * lanes, "rows");
        source(0, span(features, number(op.source_stride, 0, "stride"), of_plane));
        out(0, rows * features);
        halo();
    }
    void layer_norm() {
        table(op.layer_norm.scale, FLOATS, channels(), "the scale");
        table(op.layer_norm.shift, FLOATS, channels(), "the shift");
        source_planes();
        out_planes();
    }
    void softmax() {
        const Wide entries = number(op.softmax.rows, 1, "rows") * number(op.softmax.columns, 1, "columns");
        source(0, entries);
        out(0, entries);
        halo();
    }
    void copy() {
        const Wide entries = number(op.copy.entries, 1, "entries");
        source(0, entries);
        out(0, entries);
        halo();
    }

    // The largest entry of a table of 64-bit distances, none of which is negative unless `gaps` allows it.
    Wide farthest(const int64_t* data, Wide count, bool gaps, const char* what) {
        table(data, INT64S, count, what);
        Wide most = -1;
        for (int64_t i = 0; good && i < (int64_t)count; i++) {
            require(data[i] <= MOST && (gaps || data[i] >= 0), what);
            most = data[i] > most ? data[i] : most;
        }
        return most;
    }
    void pick() {
        const Pick& p = op.pick;
        const Wide outers = number(p.outer_count, 1, "the outer table"), phase = number(p.phases, 1, "phases");
        const Wide inners = number(p.inner_count, 1, "the inner table"), run = number(p.run, 1, "the run");
        const Wide first = number(p.out_first, 0, "the result"), step = number(p.out_step, 0, "the result");
        table(p.inner, INT32S, phase * inners, "the inner table");
        const Wide outer = farthest(p.outer, outers, true, "the outer table");
        if (!good) return;
        const Wide inner = extremes(p.inner, phase * inners).high;
        if (outer >= 0 && inner >= 0) source(0, outer + inner + run);
        // As of planes: a few floats that are written again and again could be any amount of work.
        require(outers * phase == 1 || step >= inners * run, "the step");
        out(first, first + (outers * phase - 1) * step + inners * run);
        halo();
    }
    void constant() {
        const Wide floats = planes() * length() * lanes;
        table(op.constant.values, FLOATS, floats, "the constant");
        out_planes();
    }
    void matmul() {
        const Matmul& p = op.matmul;
        const Wide batches = number(p.batches, 1, "products"), rows = number(p.rows, 1, "rows");
        const Wide columns = number(p.columns, 1, "columns"), depth = number(p.depth, 1, "depth");
        // A step is the size of one table, or 0 where all products share it.
        require(p.source_rows_step == 0 || p.source_rows_step == rows, "rows");
        require(p.source_depth_step == 0 || p.source_depth_step == depth, "depth");
        require(p.other_depth_step == 0 || p.other_depth_step == depth, "depth");
        require(p.other_columns_step == 0 || p.other_columns_step == columns, "columns");
        if (!good) return;
        const Wide of_source =
            farthest(p.source_rows, (p.source_rows_step ? batches : 1) * rows, false, "rows") +
            farthest(p.source_depth, (p.source_depth_step ? batches : 1) * depth, false, "depth");
        const Wide of_other =
            farthest(p.other_depth, (p.other_depth_step ? batches : 1) * depth, false, "depth") +
            farthest(p.other_columns, (p.other_columns_step ? batches : 1) * columns, false, "columns");
        source(0, of_source + 1);
        other(0, of_other + 1);
        if (p.addend_count) {
            const Wide count = number(p.addend_count, 1, "the summands");
            table(p.addend, FLOATS, count, "the summands");
            require(farthest(p.addend_batch, batches, false, "the summands") + rows * columns <= count, "the summands");
        }
        out(0, batches * rows * columns);
        halo();
    }
    void broadcast() {
        const Broadcast& p = op.broadcast;
        const Wide rows = number(p.rows, 1, "rows"), columns = number(p.columns, 1, "columns");
        require(p.how >= ADD && p.how < FIRST, "the combination");
        require(p.source_step == 0 || p.source_step == 1, "the step");
        require(p.other_step == 0 || p.other_step == 1, "the step");
        source(0, farthest(p.source_rows, rows, false, "rows") + (columns - 1) * p.source_step + 1);
        other(0, farthest(p.other_rows, rows, false, "rows") + (columns - 1) * p.other_step + 1);
        out(0, rows * columns);
        halo();
    }
    void reduce() {
        const Wide rows = number(op.reduce.rows, 1, "rows"), columns = number(op.reduce.columns, 1, "columns");
        source(0, rows * columns);
        out(0, rows);
        halo();
    }
};

}  // namespace

bool check_op(const Op& op, const Space& space, const Reach* reach, Problem& problem) {
    Check check(op, space, reach, problem);
    // Every op looks up its three buffers, also a kind that reads one of them alone.
    check.require(op.source_buffer >= 0 && op.source_buffer < space.buffers && op.source_offset >= -MOST &&
                      op.source_offset <= MOST,
                  "the buffer of the input");
    check.require(op.out_buffer >= 0 && op.out_buffer < space.buffers, "the buffer of the result");
    check.require(op.other_buffer < space.buffers && op.other_offset >= -MOST && op.other_offset <= MOST,
                  "the buffer of the second input");
    // Kernels compute steps from strides and phases, also those of an input that they do not have.
    for (const int64_t stride : {op.source_stride, op.other_stride, op.out_stride})
        check.require(stride >= 0 && stride <= INT64_C(1) << 36, "a stride");
    check.require(op.phases >= 0 && op.phases <= INT64_C(1) << 16, "phases");
    switch (op.kind) {
#define OP(kind, number, function, line) \
    case kind: check.function(); break;
#include "../kernels/ops.def"
        default: return problem.say("the plan has an op of kind %d, which this library does not know.", op.kind);
    }
    return check.good;
}

}  // namespace dsr
