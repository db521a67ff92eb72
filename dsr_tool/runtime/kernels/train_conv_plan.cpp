// Plans of gather convolutions: the tiles, the panel, and the records, sorted by counting.

#include <stdlib.h>
#include <string.h>

#include "train_conv_tiles.h"

namespace {

// A Layer is what Python says about one, in this order.
struct Layer {
    int64_t out_channels, in_channels, kernel_y, kernel_x, stride_y, stride_x, top, left, bottom, right;
    int64_t dilation_y, dilation_x, groups, height, width, lanes, blocks;
    int64_t gradient;                     // whether the plan is for the gradient to the input
    int64_t tile_y, tile_x, panel_bytes;  // 0 for the best ones
};

template <class T>
T* zeros(int64_t count) {
    return (T*)calloc(count > 0 ? count : 1, sizeof(T));
}

int64_t log2_of(int64_t n) {
    int64_t bits = 0;
    while (int64_t(1) << bits < n) bits++;
    return bits;
}

void fill_axis(Axis& axis, const Taps& taps, int64_t tile, int64_t reach) {
    axis.size = taps.size;
    axis.outputs = taps.outputs;
    axis.stride = taps.stride;
    axis.taps = taps.count;
    axis.tile = tile;
    axis.slot = zeros<int32_t>(taps.count);
    axis.phase = zeros<int32_t>(taps.count);
    axis.from = zeros<int32_t>(taps.slots(reach, nullptr, nullptr));
    axis.slots = taps.slots(reach, axis.slot, axis.from);
    for (int64_t k = 0; k < taps.count; k++) axis.phase[k] = (int32_t)taps.phase[k];
}

// Cuts the source channels into blocks: whole groups of the convolution, or parts of one group.
void fill_blocks(ConvPlan& g, int64_t groups, int64_t held) {
    const int64_t channels = g.channels / groups, rows = g.rows / groups;
    const int64_t parts = held >= channels ? 1 : divide_up(channels, held);
    const int64_t together = parts > 1 ? 1 : least(held / channels > 0 ? held / channels : 1, groups);
    g.block_count = parts > 1 ? parts * groups : divide_up(groups, together);
    g.blocks = zeros<ChannelBlock>(g.block_count);
    int64_t counts = 0;
    for (int64_t b = 0; b < g.block_count; b++) {
        const int64_t group = parts > 1 ? b / parts : b * together, part = parts > 1 ? b % parts : 0;
        const int64_t taken = parts > 1 ? 1 : least(together, groups - group);
        const int64_t begin = part * channels / parts, end = (part + 1) * channels / parts;
        ChannelBlock& block = g.blocks[b];
        block.channel = (int32_t)(group * channels + begin);
        block.channels = (int32_t)(parts > 1 ? end - begin : taken * channels);
        block.row = (int32_t)(group * rows);
        block.rows = (int32_t)(taken * rows);
        block.first = part == 0;
        block.last = part == parts - 1;
        block.count = counts;
        counts += block.rows;
        if (block.rows > g.widest_rows) g.widest_rows = block.rows;
        const int64_t floats = block.channels * g.y.slots * g.pitch;
        if (floats > g.panel_floats) g.panel_floats = floats;
    }
    g.counts = zeros<uint16_t>(counts);
    g.bytes += counts * sizeof(uint16_t) + g.block_count * sizeof(ChannelBlock);
}

// Columns tells what each position in one row of the weight, which is one output channel, means.
struct Columns {
    int64_t count;
    uint16_t* offset;  // of the tap in the panel, without the channel
    int32_t* local;    // channel within the group
    int32_t* row;      // row of the result that the tap belongs to, from the channel's first on; -1 for dead taps

    Columns(const Layer& layer, const ConvPlan& g) {
        const int64_t taps = layer.kernel_y * layer.kernel_x;
        count = layer.in_channels / layer.groups * taps;
        offset = zeros<uint16_t>(count);
        local = zeros<int32_t>(count);
        row = zeros<int32_t>(count);
        for (int64_t i = 0; i < count; i++) {
            const int64_t tap = i % taps, ky = tap / layer.kernel_x, kx = tap % layer.kernel_x;
            const int32_t sy = g.y.slot[ky], sx = g.x.slot[kx];
            local[i] = (int32_t)(i / taps);
            row[i] = -1;
            if (sy < 0 || sx < 0) continue;
            offset[i] = (uint16_t)(sy * g.x.slots + sx);
            for (int64_t p = 0; p < g.phases; p++)
                if (g.phase_y[p] == g.y.phase[ky] && g.phase_x[p] == g.x.phase[kx]) row[i] = (int32_t)p;
        }
    }
    ~Columns() {
        free(offset);
        free(local);
        free(row);
    }
    Columns(const Columns&) = delete;
};

// Calls f(record's block, its row, its offset, canonical index) for each live weight in canonical order.
template <class F>
void each_weight(const Layer& layer, const ConvPlan& g, const Columns& columns, const int32_t* block_of,
                 const int32_t* positions, int64_t nnz, F f) {
    const int64_t outs = layer.out_channels / layer.groups, ins = layer.in_channels / layer.groups;
    const int64_t slots = g.y.slots * g.x.slots;
    int64_t out = -1, base = 0, end = 0, channel_base = 0;
    for (int64_t i = 0; i < nnz; i++) {
        const int64_t position = (uint32_t)positions[i];
        if (position >= end) {
            out = position / columns.count;
            base = out * columns.count;
            end = base + columns.count;
            channel_base = out / outs * ins;
        }
        const int64_t column = position - base;
        if (columns.row[column] < 0) continue;
        const int64_t in = channel_base + columns.local[column];
        const int64_t source = layer.gradient ? out : in;
        const int64_t row = layer.gradient ? in * g.phases + columns.row[column] : out;
        const int32_t b = block_of[source];
        const ChannelBlock& block = g.blocks[b];
        f(block, row - block.row, (uint16_t)((source - block.channel) * slots + columns.offset[column]), i);
    }
}

// Finds the first weight of each block of a plan for the gradient, whose source channels are rows of the weight, and
// returns the most weights that a block has.
int64_t find_values(ConvPlan& g, const Columns& columns, const int32_t* positions, int64_t nnz) {
    int64_t at = 0, most = 0;
    for (int64_t b = 0; b < g.block_count; b++) {
        const int64_t end = (g.blocks[b].channel + g.blocks[b].channels) * columns.count, first = at;
        while (at < nnz && (uint32_t)positions[at] < end) at++;
        g.blocks[b].value = first;
        if (at - first > most) most = at - first;
    }
    return most;
}

void fill_records(ConvPlan& g, const Layer& layer, const int32_t* positions, int64_t nnz) {
    const Columns columns(layer, g);
    int32_t* block_of = zeros<int32_t>(g.channels);
    for (int64_t b = 0; b < g.block_count; b++)
        for (int64_t c = 0; c < g.blocks[b].channels; c++) block_of[g.blocks[b].channel + c] = (int32_t)b;
    const int64_t counts = g.blocks[g.block_count - 1].count + g.blocks[g.block_count - 1].rows;
    uint32_t* next = zeros<uint32_t>(counts);
    each_weight(layer, g, columns, block_of, positions, nnz,
                [&](const ChannelBlock& block, int64_t row, uint16_t, int64_t) { g.counts[block.count + row]++; });
    for (int64_t b = 0; b < g.block_count; b++) {
        ChannelBlock& block = g.blocks[b];
        block.record = g.records;
        block.sum = g.sums;
        for (int64_t i = block.count; i < block.count + block.rows; i++) {
            next[i] = (uint32_t)g.records;
            g.records += g.counts[i];
            g.sums += g.counts[i] / REDUCED + __builtin_popcount(g.counts[i] % REDUCED);
        }
    }
    g.nnz = nnz;
    g.offsets = zeros<uint16_t>(g.records);
    g.bytes += g.records * sizeof(uint16_t);
    const bool canonical = !layer.gradient && g.records == nnz;
    const bool near = !canonical && layer.gradient && find_values(g, columns, positions, nnz) <= 65536;
    if (near) g.near = zeros<uint16_t>(g.records);
    if (!canonical && !near) g.order = zeros<int32_t>(g.records);
    g.bytes += canonical ? 0 : g.records * (int64_t)(near ? sizeof(uint16_t) : sizeof(int32_t));
    each_weight(layer, g, columns, block_of, positions, nnz,
                [&](const ChannelBlock& block, int64_t row, uint16_t offset, int64_t i) {
                    const uint32_t at = next[block.count + row]++;
                    g.offsets[at] = offset;
                    if (near) g.near[at] = (uint16_t)(i - block.value);
                    if (g.order) g.order[at] = (int32_t)i;
                });
    free(next);
    free(block_of);
}

// Blocks of images that lie side by side in a pixel: enough of them that one row fills the registers.
int64_t group_for(const Layer& layer, const Taps& ty, const Taps& tx) {
    const int64_t floats = ty.outputs * tx.outputs * layer.lanes;
    int64_t group = 1;
    while (group * 2 <= layer.blocks && group * 2 * floats <= WIDEST_GATHER * LANES) group *= 2;
    return group;
}

void fill_phases(ConvPlan& g, const Layer& layer, const Taps& ty, const Taps& tx) {
    const int64_t sy = layer.gradient ? layer.stride_y : 1, sx = layer.gradient ? layer.stride_x : 1;
    g.out_stride_y = sy;
    g.out_stride_x = sx;
    g.phase_y = zeros<int32_t>(sy * sx);
    g.phase_x = zeros<int32_t>(sy * sx);
    for (int64_t py = 0; py < sy; py++)
        for (int64_t px = 0; px < sx; px++) {
            bool met = !layer.gradient;
            for (int64_t i = 0; i < ty.count; i++)
                for (int64_t j = 0; j < tx.count; j++)
                    met |= ty.phase[i] == py && tx.phase[j] == px && ty.live[i] && tx.live[j];
            if (!met) continue;
            g.phase_y[g.phases] = (int32_t)py;
            g.phase_x[g.phases++] = (int32_t)px;
        }
    g.complete = g.phases == sy * sx;
}

// A convolution with one tap and stride 1 knows no rows: its plane is one long row.
void flatten(Layer& layer) {
    if (layer.kernel_y * layer.kernel_x * layer.stride_y * layer.stride_x != 1) return;
    if (layer.top || layer.left || layer.bottom || layer.right) return;
    layer.width *= layer.height;
    layer.height = 1;
}

}  // namespace

extern "C" {

// Makes a plan of a layer; `layer` is the fields of Layer, `positions` (nnz) the flat indices of the weights in
// ascending order. Returns null if there is no memory.
ConvPlan* dsr_conv_plan_new(const int64_t* fields, const int32_t* positions, int64_t nnz) {
    Layer layer;
    memcpy(&layer, fields, sizeof layer);
    flatten(layer);
    const Taps ty(layer.height, layer.top, layer.bottom, layer.kernel_y, layer.stride_y, layer.dilation_y,
                  layer.gradient);
    const Taps tx(layer.width, layer.left, layer.right, layer.kernel_x, layer.stride_x, layer.dilation_x,
                  layer.gradient);
    ConvPlan* g = zeros<ConvPlan>(1);
    g->bytes = sizeof *g;
    g->lanes = layer.lanes;
    g->group = group_for(layer, ty, tx);
    fill_phases(*g, layer, ty, tx);
    g->channels = layer.gradient ? layer.out_channels : layer.in_channels;
    g->rows = layer.gradient ? layer.in_channels * g->phases : layer.out_channels;
    g->out_channels = layer.gradient ? layer.in_channels : layer.out_channels;
    g->out_height = layer.gradient ? layer.height : ty.outputs;
    g->out_width = layer.gradient ? layer.width : tx.outputs;
    const int64_t pixel = g->group * g->lanes;
    const int64_t budget = layer.panel_bytes ? layer.panel_bytes : first_cache() * 7 / 8;
    const bool far = g->channels * ty.size * tx.size * pixel * (int64_t)sizeof(float) > second_cache();
    g->shift = log2_of(pixel * sizeof(float));
    const Chooser chooser{ty, tx, pixel, g->rows ? double(nnz) / g->rows : 0, g->channels / layer.groups,
                          g->rows / layer.groups, budget, far};
    const Choice choice =
        layer.tile_y ? chooser.estimate(least(layer.tile_y, ty.outputs), least(layer.tile_x, tx.outputs))
                     : chooser.best();
    fill_axis(g->y, ty, choice.y, choice.y);
    fill_axis(g->x, tx, choice.x, chooser.reach(choice.x));
    g->pitch = g->x.slots * pixel;
    g->tile_rows = choice.rows;
    g->tile_columns = choice.columns;
    const int64_t vectors = divide_up(choice.x * pixel, LANES);
    fewest_tiles(choice.y, vectors, WIDEST_WEIGHTS, g->weight_rows, g->weight_columns);
    g->direct = g->group == 1 && g->out_stride_y * g->out_stride_x == 1 && tx.outputs * pixel % LANES == 0 &&
                choice.x * pixel % LANES == 0;
    const int64_t slots = g->y.slots * g->x.slots;
    int64_t held = budget / (slots ? slots * pixel * (int64_t)sizeof(float) : 1);
    if (slots) held = least(held, 65535 / slots);
    fill_blocks(*g, layer.groups, held > 0 ? held : 1);
    fill_records(*g, layer, positions, nnz);
    g->streams = far && g->group == 1 && g->y.slots == 1;
    return g;
}

void dsr_conv_plan_free(ConvPlan* g) {
    if (!g) return;
    Axis* axes[] = {&g->y, &g->x};
    for (Axis* axis : axes) {
        free(axis->slot);
        free(axis->from);
        free(axis->phase);
    }
    free(g->phase_y);
    free(g->phase_x);
    free(g->blocks);
    free(g->counts);
    free(g->offsets);
    free(g->near);
    free(g->order);
    free(g);
}

// Bytes of a plan.
int64_t dsr_conv_plan_bytes(const ConvPlan* g) { return g->bytes; }
}
