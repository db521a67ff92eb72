// The three ways in which the active entries of a weight are given: all of them, a bit each, or their positions.
//
// Each has the same two functions, so that packing is compiled once for each. Both take a range of flat positions, and
// neither reads or calls back out of bounds, whatever the memory behind the weight holds:
//
//     count(from, to, first)          active entries in [from, to), where `first` lie before: no more than are left,
//                                     and no more than to - from
//     each(from, first, number, extent, f)
//                                     calls f(i, position - from) for `number` entries from the `first` one on, which
//                                     lie in [from, from + extent); i counts from 0. Returns false if they do not.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

namespace dsr {

// The number of bits that are set. Without the instruction, gcc calls a function for it.
inline int bits_of(uint64_t word) {
#if defined(__POPCNT__) || !defined(__x86_64__)
    return __builtin_popcountll(word);
#else
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    return int(((word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u >> 56);
#endif
}

struct AllEntries {
    explicit AllEntries(const Weight&) {}

    int64_t count(int64_t from, int64_t to, int64_t) const { return to - from; }

    template <class F>
    bool each(int64_t, int64_t, int64_t number, int64_t extent, F f) const {
        if (number > extent) return false;
        for (int64_t i = 0; i < number; i++) f(i, i);
        return true;
    }
};

struct EntryBits {
    const uint8_t* bits;
    int64_t size, active;

    explicit EntryBits(const Weight& weight) : bits(weight.bits), size(weight.size), active(weight.active) {}

    // The bits from a position on, the first one highest: at most `most`, zeros after them; and their number.
    uint64_t word(int64_t position, int64_t most, int64_t& number) const {
        const int64_t byte = position >> 3, left = ((size + 7) >> 3) - byte;
        uint64_t raw = 0;
        if (left >= 8) {
            memcpy(&raw, bits + byte, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
            raw = __builtin_bswap64(raw);
#endif
        } else {
            for (int64_t i = 0; i < left; i++) raw |= uint64_t(bits[byte + i]) << (56 - 8 * i);
        }
        number = 64 - (position & 7);
        if (number > most) number = most;
        return raw << (position & 7) & ~uint64_t(0) << (64 - number);
    }

    // All active entries in a range.
    int64_t count_all(int64_t from, int64_t to) const {
        int64_t found = 0, number;
        for (int64_t at = from; at < to; at += number) found += bits_of(word(at, to - at, number));
        return found;
    }

    int64_t count(int64_t from, int64_t to, int64_t first) const {
        const int64_t found = count_all(from, to);
        return found < active - first ? found : active - first;
    }

    template <class F>
    bool each(int64_t from, int64_t, int64_t number, int64_t extent, F f) const {
        int64_t i = 0, valid;
        for (int64_t at = 0; at < extent && i < number; at += valid) {
            uint64_t rest = word(from + at, extent - at, valid);
            if (bits_of(rest) > number - i) return false;
            for (; rest; i++) {
                const int zeros = __builtin_clzll(rest);
                f(i, at + zeros);
                rest &= ~(uint64_t(1) << 63 >> zeros);
            }
        }
        return i == number;
    }
};

struct EntryPositions {
    const int64_t* positions;
    int64_t active;

    explicit EntryPositions(const Weight& weight) : positions(weight.positions), active(weight.active) {}

    int64_t count(int64_t from, int64_t to, int64_t first) const {
        // Positions that do not ascend may be more than the range has.
        const int64_t end = to - from < active - first ? first + (to - from) : active;
        int64_t next = first;
        while (next < end && positions[next] < to) next++;
        return next - first;
    }

    template <class F>
    bool each(int64_t from, int64_t first, int64_t number, int64_t extent, F f) const {
        for (int64_t i = 0; i < number; i++) {
            const uint64_t relative = uint64_t(positions[first + i]) - uint64_t(from);
            if (relative >= uint64_t(extent)) return false;
            f(i, int64_t(relative));
        }
        return true;
    }
};

}  // namespace dsr
