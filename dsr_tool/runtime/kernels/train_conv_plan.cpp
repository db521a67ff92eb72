// Plans of gather convolutions: the tiles, the panel, and the records, sorted by counting.

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "train_conv.h"

namespace {

// What Python says about a layer, in this order.
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

// The taps of one direction before the tile is known.
struct Taps {
    int64_t size, outputs, stride, count;
    int64_t *offset, *phase, *limit;  // source offset; phase of the result; positions of the grid in that phase

    Taps(int64_t taps) : size(), outputs(), stride(1), count(taps) { offset = zeros<int64_t>(3 * taps); phase = offset + taps; limit = phase + taps; }
    ~Taps() { free(offset); }
    Taps(const Taps&) = delete;

    void forward(int64_t n, int64_t before, int64_t after, int64_t step, int64_t dilation) {
        size = n;
        stride = step;
        outputs = (n + before + after - dilation * (count - 1) - 1) / step + 1;
        for (int64_t k = 0; k < count; k++) offset[k] = k * dilation - before, limit[k] = outputs;
    }

    void gradient(int64_t n, int64_t before, int64_t after, int64_t step, int64_t dilation) {
        size = (n + before + after - dilation * (count - 1) - 1) / step + 1;
        outputs = divide_up(n, step);
        for (int64_t k = 0; k < count; k++) {
            const int64_t p = ((k * dilation - before) % step + step) % step;
            phase[k] = p;
            offset[k] = (p + before - k * dilation) / step;
            limit[k] = divide_up(n - p, step);
        }
    }

    bool live(int64_t k) const {
        for (int64_t q = 0; q < limit[k]; q++)
            if (q * stride + offset[k] >= 0 && q * stride + offset[k] < size) return true;
        return false;
    }

    int64_t base() const {
        int64_t low = INT64_MAX;
        for (int64_t k = 0; k < count; k++)
            if (live(k) && offset[k] < low) low = offset[k];
        return low;
    }

    // Slots of a panel for `tile` positions: those of a residue follow each other, and taps far apart leave gaps out.
    // Fills `slot` (taps) and `from` unless they are null.
    int64_t slots(int64_t tile, int32_t* slot, int32_t* from) const {
        int64_t used = 0;
        if (slot)
            for (int64_t k = 0; k < count; k++) slot[k] = -1;
        const int64_t low = base();
        for (int64_t residue = 0; residue < stride; residue++) {
            int64_t next = 0;  // first shift that has no slot yet
            for (int64_t shift = 0;; shift++) {
                // The smallest shift from here on that a tap of this residue has.
                int64_t found = INT64_MAX;
                for (int64_t k = 0; k < count; k++) {
                    const int64_t e = offset[k] - low;
                    if (e >= 0 && e % stride == residue && e / stride >= shift && e / stride < found && live(k)) found = e / stride;
                }
                if (found == INT64_MAX) break;
                shift = found;
                const int64_t begin = shift > next ? shift : next;
                if (from)
                    for (int64_t s = begin; s < shift + tile; s++) from[used + s - begin] = (int32_t)(s * stride + residue + low);
                used += shift + tile - begin;
                next = shift + tile;
                if (slot)
                    for (int64_t k = 0; k < count; k++)
                        if (offset[k] - low == shift * stride + residue && live(k)) slot[k] = (int32_t)(used - tile);
            }
        }
        return used;
    }
};

int64_t cache_bytes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
    const long found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    if (found >= 16384 && found <= 262144) return found;
#endif
    return 32768;
}

int64_t log2_of(int64_t n) {
    int64_t bits = 0;
    while (int64_t(1) << bits < n) bits++;
    return bits;
}

// Cycles of work, about: what the choice between tiles rests on.
struct Choice {
    double cost;
    int64_t tile_y, tile_x;
    int rows, columns;
};

struct Chooser {
    const Taps &ty, &tx;
    int64_t pixel;     // floats of a pixel
    double records;    // of a row, over all channels
    int64_t channels;  // that a row reads
    int64_t rows;      // that read these channels
    int64_t budget;    // bytes of a panel

    // Positions that a row of `vectors` covers.
    int64_t reach(int64_t positions) const { return divide_up(divide_up(positions * pixel, LANES) * LANES, pixel); }

    Choice tile(int64_t tile_y, int64_t tile_x) const {
        const int64_t vectors = divide_up(tile_x * pixel, LANES);
        const double panel = double(ty.slots(tile_y, nullptr, nullptr)) * tx.slots(reach(tile_x), nullptr, nullptr) * pixel / LANES;
        double held = (double)budget / (panel * VECTOR_BYTES);
        held = held < 1 ? 1 : held > channels ? channels : (double)(int64_t)held;
        const double blocks = channels / held;
        Choice best{1e300, tile_y, tile_x, 1, 1};
        for (int r = 1; r <= MOST_ROWS && r <= tile_y; r++) {
            const int64_t most = WIDEST_GATHER / r;
            const int64_t across = divide_up(vectors, most), down = divide_up(tile_y, r);
            const int c = (int)divide_up(vectors, across);
            const double tiles = double(across) * down, outputs = double(vectors) * tile_y;
            double cost = rows * (records * (0.5 * outputs + 2 * tiles) + blocks * (1.5 * outputs + 12 * tiles));
            cost += 2.5 * channels * panel;
            // Tiles at the ends of the grid are partly empty.
            const double useful = double(ty.outputs * tx.outputs) / (divide_up(ty.outputs, tile_y) * divide_up(tx.outputs, tile_x));
            cost /= useful;
            if (cost < best.cost) best = {cost, tile_y, tile_x, r, c};
        }
        return best;
    }

    Choice best() const {
        Choice found{1e300, 1, 1, 1, 1};
        for (int64_t down = 1; down <= ty.outputs; down++) {
            const int64_t tile_y = divide_up(ty.outputs, down);
            if (tile_y > 8) continue;
            for (int64_t across = 1; across <= tx.outputs; across++) {
                const int64_t tile_x = evenly(across);
                if (tile_x * pixel > 64 * LANES) continue;
                if (tile_x * pixel * 2 < LANES * 2 && tile_x < tx.outputs) break;
                const Choice choice = tile(tile_y, tile_x);
                if (choice.cost < found.cost) found = choice;
                if (tile_x <= 1) break;
            }
            if (tile_y == 1) break;
        }
        return found;
    }

    // The width of a tile if there are `across` in a row: whole vectors, except at the end of the row.
    int64_t evenly(int64_t across) const {
        const int64_t step = pixel < LANES ? LANES / pixel : 1, width = divide_up(tx.outputs, across);
        return least(divide_up(width, step) * step, tx.outputs);
    }
};

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

// What the positions of one row of the weight, which is one output channel, mean.
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
        const int64_t source = layer.gradient ? out : in, row = layer.gradient ? in * g.phases + columns.row[column] : out;
        const int32_t b = block_of[source];
        const ChannelBlock& block = g.blocks[b];
        f(block, row - block.row, (uint16_t)((source - block.channel) * slots + columns.offset[column]), i);
    }
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
    if (!canonical) {
        g.order = zeros<int32_t>(g.records);
        g.bytes += g.records * sizeof(int32_t);
    }
    each_weight(layer, g, columns, block_of, positions, nnz,
                [&](const ChannelBlock& block, int64_t row, uint16_t offset, int64_t i) {
                    const uint32_t at = next[block.count + row]++;
                    g.offsets[at] = offset;
                    if (!canonical) g.order[at] = (int32_t)i;
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
                    met |= ty.phase[i] == py && tx.phase[j] == px && ty.live(i) && tx.live(j);
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

void weight_tile(ConvPlan& g, int64_t vectors) {
    double best = 1e300;
    for (int r = 1; r <= MOST_ROWS && r <= g.y.tile; r++) {
        const int64_t across = divide_up(vectors, WIDEST_WEIGHTS / r), down = divide_up(g.y.tile, r);
        const double cost = double(across) * down;
        if (cost > best) continue;
        best = cost;
        g.weight_rows = r;
        g.weight_columns = (int)divide_up(vectors, across);
    }
}

}  // namespace

extern "C" {

// Makes a plan of a layer; `layer` is the fields of Layer, `positions` (nnz) the flat indices of the weights in
// ascending order. Returns null if there is no memory.
ConvPlan* dsr_conv_plan_new(const int64_t* fields, const int32_t* positions, int64_t nnz) {
    Layer layer;
    memcpy(&layer, fields, sizeof layer);
    flatten(layer);
    Taps ty(layer.kernel_y), tx(layer.kernel_x);
    if (layer.gradient) {
        ty.gradient(layer.height, layer.top, layer.bottom, layer.stride_y, layer.dilation_y);
        tx.gradient(layer.width, layer.left, layer.right, layer.stride_x, layer.dilation_x);
    } else {
        ty.forward(layer.height, layer.top, layer.bottom, layer.stride_y, layer.dilation_y);
        tx.forward(layer.width, layer.left, layer.right, layer.stride_x, layer.dilation_x);
    }
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
    const int64_t pixel = g->group * g->lanes, budget = layer.panel_bytes ? layer.panel_bytes : cache_bytes() * 3 / 4;
    g->shift = log2_of(pixel * sizeof(float));
    const Chooser chooser{ty, tx, pixel, g->rows ? double(nnz) / g->rows : 0, g->channels / layer.groups, g->rows / layer.groups, budget};
    Choice choice = chooser.best();
    if (layer.tile_y) choice = chooser.tile(least(layer.tile_y, ty.outputs), least(layer.tile_x, tx.outputs));
    fill_axis(g->y, ty, choice.tile_y, choice.tile_y);
    fill_axis(g->x, tx, choice.tile_x, chooser.reach(choice.tile_x));
    g->pitch = g->x.slots * pixel;
    g->tile_rows = choice.rows;
    g->tile_columns = choice.columns;
    weight_tile(*g, divide_up(choice.tile_x * pixel, LANES));
    g->direct = g->group == 1 && g->out_stride_y * g->out_stride_x == 1 && tx.outputs * pixel % LANES == 0 && choice.tile_x * pixel % LANES == 0;
    const int64_t slots = g->y.slots * g->x.slots;
    int64_t held = budget / (slots ? slots * pixel * (int64_t)sizeof(float) : 1);
    if (slots) held = least(held, 65535 / slots);
    fill_blocks(*g, layer.groups, held > 0 ? held : 1);
    fill_records(*g, layer, positions, nnz);
    g->streams = g->group == 1 && g->y.slots == 1 && g->channels * ty.size * tx.size * pixel > 65536;
    g->ahead = 2;
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
    free(g->order);
    free(g);
}

// Bytes of a plan.
int64_t dsr_conv_plan_bytes(const ConvPlan* g) { return g->bytes; }
}
