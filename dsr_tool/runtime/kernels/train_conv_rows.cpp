// The gradient to the bias: the sum of each channel over all blocks and pixels.

#include "train_conv.h"

namespace {

struct Sums {
    const float* x;
    int64_t blocks, channels, plane;
    float* out;
};

// Rows of pixels are summed in float and then in double, so the error does not grow with the number of images.
void sum_channel(const void* context, int64_t channel) {
    const Sums& sums = *(const Sums*)context;
    double total = 0;
    for (int64_t b = 0; b < sums.blocks; b++) {
        const float* x = sums.x + (b * sums.channels + channel) * sums.plane;
        for (int64_t first = 0; first < sums.plane; first += 16 * LANES) {
            const int64_t end = least(first + 16 * LANES, sums.plane);
            Vec part{};
            int64_t i = first;
            for (; i + LANES <= end; i += LANES) part += load(x + i);
            for (; i < end; i++) total += x[i];
            total += sum(part);
        }
    }
    sums.out[channel] = (float)total;
}

}  // namespace

extern "C" {

// Computes the sums of (blocks, channels, plane) floats over blocks and planes.
void dsr_channel_sums(const float* x, int64_t blocks, int64_t channels, int64_t plane, float* out, Pool* pool) {
    const Sums sums{x, blocks, channels, plane, out};
    parallel(pool, channels, sum_channel, &sums);
}
}
