// Reading the bytes of a plan file from front to back. Nothing in the file is an offset that would have to be trusted.
//
// Everything is little-endian and takes whole words of 8 bytes; strings and arrays are filled up with zeros. Past the
// end, a reader returns zeros and remembers that it failed.
#pragma once

#include <cstdint>
#include <cstring>

namespace dsr {

struct Reader {
    const uint8_t *now, *end;
    bool failed = false;

    Reader(const void* bytes, int64_t size) : now((const uint8_t*)bytes), end(now + size) {}

    // The next `size` bytes, and past their padding; null if there are fewer.
    const void* block(int64_t size) {
        const int64_t left = end - now;
        if (failed || size < 0 || size > left || (size + 7) / 8 * 8 > left) {
            failed = true;
            return nullptr;
        }
        const void* found = now;
        now += (size + 7) / 8 * 8;
        return found;
    }
    int64_t word() {
        int64_t value = 0;
        if (const void* found = block(8)) memcpy(&value, found, 8);
        return value;
    }
    // A number in [low, high].
    int64_t word_in(int64_t low, int64_t high) {
        const int64_t value = word();
        if (value < low || value > high) failed = true;
        return failed ? low : value;
    }
    // The number of things that follow, each of at least `least` bytes, so that no file asks for more than it holds.
    int64_t count(int64_t least) { return word_in(0, failed ? 0 : (end - now) / least); }

    // A string with the zero that ends it.
    const char* string() {
        const int64_t size = word();
        const char* found = (const char*)block(size);
        if (!found || size < 1 || found[size - 1] != 0 || memchr(found, 0, size) != found + size - 1) failed = true;
        return failed ? "" : found;
    }
};

}  // namespace dsr
