// The memory of gather convolutions: panels, staged tiles, values in the order of the records, and buffers.

#include <stdlib.h>

#include "train_conv.h"

namespace {

constexpr int64_t AHEAD = 3;  // channels

typedef float Four __attribute__((vector_size(16)));

// `count` is a multiple of four, as lanes are.
inline void copy(float* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; i += 4) std::memcpy(to + i, from + i, sizeof(Four));
}

inline void clear(float* to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, Vec{});
    for (; i < count; i += 4) std::memset(to + i, 0, sizeof(Four));
}

// Copies, and asks for what lies `ahead` floats further on: channels are far apart, so the hardware prefetches none.
inline void copy_ahead(float* to, const float* from, int64_t count, int64_t ahead) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __builtin_prefetch(from + i + ahead);
        for (int64_t j = i; j < i + 16; j += LANES) store(to + j, load(from + j));
    }
    copy(to + i, from + i, count - i);
}

// One row of the panel whose pixels are neighbours in the source, too.
void pack_neighbours(const ConvPlan& g, const float* row, int64_t x, int64_t ahead, float* panel) {
    const int64_t n = g.x.slots, lanes = g.lanes;
    const int64_t left = x < 0 ? least(-x, n) : 0, end = g.x.size - x < n ? g.x.size - x : n;
    clear(panel, left * lanes);
    if (end > left) copy_ahead(panel + left * lanes, row + (x + left) * lanes, (end - left) * lanes, ahead);
    const int64_t rest = end > left ? end : left;
    clear(panel + rest * lanes, (n - rest) * lanes);
}

// One row of the panel pixel by pixel, for strides and for several blocks; `step` floats lie between blocks.
void pack_pixels(const ConvPlan& g, const float* row, int64_t step, int64_t blocks, int64_t x, int64_t ahead,
                 float* panel) {
    for (int64_t i = 0; i < g.x.slots; i++) {
        const int64_t at = x + g.x.from[i];
        const bool inside = at >= 0 && at < g.x.size;
        for (int64_t b = 0; b < g.group; b++, panel += g.lanes) {
            if (inside && b < blocks) {
                __builtin_prefetch(row + b * step + at * g.lanes + ahead);
                copy(panel, row + b * step + at * g.lanes, g.lanes);
            } else {
                clear(panel, g.lanes);
            }
        }
    }
}

}  // namespace

void pack_panel(const ConvPlan& g, const ChannelBlock& block, const Place& place, const float* source, int64_t blocks,
                float* panel) {
    if (!g.x.slots) return;
    const int64_t plane = g.y.size * g.x.size * g.lanes, step = g.channels * plane;
    const int64_t y = place.y.first * g.y.stride, x = place.x.first * g.x.stride;
    const bool neighbours = g.group == 1 && g.x.stride == 1 && g.x.from[g.x.slots - 1] - g.x.from[0] == g.x.slots - 1;
    source += place.group * g.group * step + block.channel * plane;
    for (int64_t c = 0; c < block.channels; c++, source += plane) {
        for (int64_t j = 0; j < g.y.slots; j++, panel += g.pitch) {
            const int64_t at = y + g.y.from[j];
            if (at < 0 || at >= g.y.size) {
                clear(panel, g.pitch);
                continue;
            }
            const float* row = source + at * g.x.size * g.lanes;
            if (neighbours) {
                pack_neighbours(g, row, x + g.x.from[0], AHEAD * plane, panel);
            } else {
                pack_pixels(g, row, step, blocks - place.group * g.group, x, AHEAD * plane, panel);
            }
        }
    }
}

Stream::Stream(const ConvPlan& g, const ChannelBlock& block, const Place& place, const float* source, int64_t calls)
    : Stream() {
    if (!g.streams) return;
    const int64_t x = place.x.first * g.x.stride;
    int64_t low = g.x.size, high = 0;
    for (int64_t i = 0; i < g.x.slots; i++) {
        const int64_t at = x + g.x.from[i];
        if (at < 0 || at >= g.x.size) continue;
        if (at < low) low = at;
        if (at >= high) high = at + 1;
    }
    if (low >= high) return;
    pitch = g.x.size * g.lanes;
    plane = g.y.size * pitch;
    channel = source + (place.group * g.channels + block.channel) * plane;
    from = g.y.from;
    y = place.y.first * g.y.stride;
    height = g.y.size;
    slots = g.y.slots;
    first = low * g.lanes;
    lines = divide_up((high - low) * g.lanes, 16);
    slot = 0;
    left = block.channels * slots;
    at_once = divide_up(left, calls);
}

namespace {

// Calls move(floats of the buffer, floats of the activation, count) for each run of lanes of a staged tile; the second
// is null where the activation ends.
template <class Move>
inline void each_piece(const Staging& s, float* buffer, float* out, Move move) {
    const ConvPlan& g = s.g;
    const int64_t pixel = g.group * g.lanes, piece = least(g.lanes, LANES);
    const int64_t plane = g.out_height * g.out_width * g.lanes, step = g.out_channels * plane;
    const int64_t first = s.x * LANES, end = first + s.vectors * LANES, first_block = s.place.group * g.group;
    for (int64_t row = s.row; row < s.row + s.rows; row++) {
        const int64_t channel = row / g.phases, phase = row % g.phases;
        float* base = out + first_block * step + channel * plane;
        for (int64_t r = 0; r < s.height; r++) {
            const int64_t y = (s.place.y.first + s.y + r) * g.out_stride_y + g.phase_y[phase];
            int64_t q = first / pixel, block = first % pixel / g.lanes, lane = first % g.lanes;
            int64_t x = (s.place.x.first + q) * g.out_stride_x + g.phase_x[phase];
            float* line = y < g.out_height ? base + y * g.out_width * g.lanes : nullptr;
            for (int64_t f = first; f < end; f += piece, buffer += piece) {
                const bool inside = line && x < g.out_width && q < s.place.x.count && first_block + block < s.blocks;
                move(buffer, inside ? line + block * step + x * g.lanes + lane : nullptr, piece);
                if ((lane += piece) < g.lanes) continue;
                lane = 0;
                if (++block < g.group) continue;
                block = 0;
                q++;
                x += g.out_stride_x;
            }
        }
    }
}

}  // namespace

void unstage(const Staging& s, const float* buffer, float* out) {
    const int64_t ahead = s.g.out_height * s.g.out_width * s.g.lanes;
    each_piece(s, const_cast<float*>(buffer), out, [=](const float* from, float* to, int64_t count) {
        if (!to) return;
        // Rows are planes apart; the stores of this one wait less if the line was asked for.
        __builtin_prefetch(to + ahead, 1);
        copy(to, from, count);
    });
}

void stage(const Staging& s, const float* in, float* buffer) {
    each_piece(s, buffer, const_cast<float*>(in), [](float* to, const float* from, int64_t count) {
        if (from) {
            copy(to, from, count);
        } else {
            clear(to, count);
        }
    });
}

void gather_values(const ConvPlan& g, const float* canonical, float* ordered) {
    each_run(g, [=](int64_t record, int64_t index, int64_t count) {
        for (int64_t i = 0; i < count; i++) ordered[record + i] = canonical[index + i];
    });
}

Buffers::Buffers(Pool* pool, int64_t wanted)
    : memory(nullptr), floats(whole_lines(wanted) + 16), count(threads_of(pool)), taken(nullptr) {
    memory = (float*)aligned_alloc(64, (size_t)(floats * count) * sizeof(float));
    taken = (std::atomic<bool>*)calloc(count, sizeof(std::atomic<bool>));
}

Buffers::~Buffers() {
    free(memory);
    free(taken);
}

float* Buffers::take() {
    // There are as many buffers as threads, so one is free at every moment.
    for (int i = 0;; i = i + 1 < count ? i + 1 : 0)
        if (!taken[i].exchange(true, std::memory_order_acquire)) return memory + i * floats;
}

void Buffers::give_back(float* buffer) {
    taken[(buffer - memory) / floats].store(false, std::memory_order_release);
}
