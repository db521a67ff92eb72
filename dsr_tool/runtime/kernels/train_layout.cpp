// Blocked tensors from rows of images, and back.
//
// Either way squares of images x floats are transposed in registers, so that memory sees whole runs: every float is
// read once and written once. Where channels come first, an image is one run of channels * pixels floats in the order
// that a block has too. Where they come last, a square is `lanes` images by some channels of one pixel, and its lines
// go to as many planes.

#include "train_planes.h"
#include "transpose.h"

using namespace planes;

namespace {

constexpr int64_t RUN = 512;  // lines that are worth asking another thread for: 32 KiB each way

// `rows` runs of `lines` floats, each up to WIDTH and `from_step` apart, become `lines` runs of WIDTH floats.
// `readable` floats from the start of each run may be read, and as many as `writable` written.
template <class V>
__attribute__((always_inline)) inline void square(const float* from, int64_t from_step, int64_t rows, int64_t readable,
                                                  float* to, int64_t to_step, int64_t lines, int64_t writable) {
    constexpr int WIDTH = sizeof(V) / 4;
    V v[WIDTH];
    const int64_t bytes = 4 * (readable < WIDTH ? readable : WIDTH), out = 4 * (writable < WIDTH ? writable : WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        v[i] = V{};
        if (i >= rows) continue;
        if (bytes == sizeof(V)) std::memcpy(&v[i], from + i * from_step, sizeof(V));
        else std::memcpy(&v[i], from + i * from_step, bytes);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        if (i >= lines) continue;
        if (out == sizeof(V)) std::memcpy(to + i * to_step, &v[i], sizeof(V));
        else std::memcpy(to + i * to_step, &v[i], out);
    }
}

struct Layout {
    int64_t images, channels, pixels, lanes, image_step;
    int channels_last;
};

struct Move {
    Layout l;
    float *rows, *blocked;  // one is only read
    bool into_blocked;

    int64_t floats() const { return l.channels * l.pixels; }  // of an image

    // Floats q to q + count of the images of a block; they are lines of the block, `line_step` floats apart.
    template <class V>
    __attribute__((always_inline)) inline void tile(int64_t block, int64_t q, int64_t count, int64_t line,
                                                    int64_t line_step) const {
        constexpr int WIDTH = sizeof(V) / 4;
        float* const lines = blocked + block * floats() * l.lanes + line * l.lanes;
        for (int64_t lane = 0; lane < l.lanes; lane += WIDTH) {
            const int64_t first = block * l.lanes + lane, left = l.images - first;
            const int64_t images = left < 0 ? 0 : left < WIDTH ? left : WIDTH;
            float* const row = rows + first * l.image_step + q;
            if (into_blocked) {
                if (images == WIDTH && count == WIDTH)
                    square<V>(row, l.image_step, WIDTH, WIDTH, lines + lane, line_step, WIDTH, WIDTH);
                else
                    square<V>(row, l.image_step, images, floats() - q, lines + lane, line_step, count, WIDTH);
            } else {
                if (images == WIDTH && count == WIDTH)
                    square<V>(lines + lane, line_step, WIDTH, WIDTH, row, l.image_step, WIDTH, WIDTH);
                else
                    square<V>(lines + lane, line_step, count, WIDTH, row, l.image_step, images, count);
            }
        }
    }

    template <class V> void run(Pool* pool) const {
        constexpr int64_t WIDTH = sizeof(V) / 4;
        const int64_t blocks = (l.images + l.lanes - 1) / l.lanes;
        if (!l.channels_last) {
            const int64_t runs = (floats() + RUN - 1) / RUN;
            each(pool, blocks * runs, RUN * l.lanes, [&](int64_t item) {
                const int64_t begin = item % runs * RUN, end = begin + RUN < floats() ? begin + RUN : floats();
                for (int64_t q = begin; q < end; q += WIDTH)
                    tile<V>(item / runs, q, end - q < WIDTH ? end - q : WIDTH, q, l.lanes);
            });
            return;
        }
        // Pixels of one share: their channels fill a run, but at least four pixels, which are neighbours in a plane.
        const int64_t at_once = RUN / l.channels < 4 ? 4 : RUN / l.channels;
        const int64_t shares = (l.pixels + at_once - 1) / at_once;
        each(pool, blocks * shares, at_once * l.channels * l.lanes, [&](int64_t item) {
            const int64_t begin = item % shares * at_once;
            const int64_t end = begin + at_once < l.pixels ? begin + at_once : l.pixels;
            for (int64_t c = 0; c < l.channels; c += WIDTH)
                for (int64_t p = begin; p < end; p++)
                    tile<V>(item / shares, p * l.channels + c, l.channels - c < WIDTH ? l.channels - c : WIDTH,
                            c * l.pixels + p, l.pixels * l.lanes);
        });
    }

    void run(Pool* pool) const {
        with_width(l.lanes, [&](auto wide) { run<typename decltype(wide)::Floats>(pool); });
    }
};

}  // namespace

extern "C" {

// Images (rows of channels * pixels floats, image_step apart) to blocks; lanes without an image become zero.
void dsr_block(const Layout* layout, const float* rows, float* blocked, Pool* pool) {
    Move{*layout, (float*)rows, blocked, true}.run(pool);
}

// Blocks to images; what lanes without an image hold is left behind.
void dsr_unblock(const Layout* layout, const float* blocked, float* rows, Pool* pool) {
    Move{*layout, rows, (float*)blocked, false}.run(pool);
}
}
