// CRC-32 (the polynomial of zip and PNG), sixteen bytes at a time: each step waits for the one before.
#pragma once

#include <cstdint>
#include <cstring>

namespace dsr {

struct ChecksumTables {
    uint32_t rows[16][256] = {};

    constexpr ChecksumTables() {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
            rows[0][i] = value;
        }
        // Row k is the effect of a byte that k other bytes follow.
        for (int k = 1; k < 16; k++)
            for (int i = 0; i < 256; i++) rows[k][i] = rows[k - 1][i] >> 8 ^ rows[0][rows[k - 1][i] & 255];
    }
};

inline uint32_t checksum(const void* bytes, int64_t size) {
    static constexpr ChecksumTables TABLES;
    const auto& rows = TABLES.rows;
    const uint8_t* now = (const uint8_t*)bytes;
    uint32_t value = ~0u;
    for (; size >= 16; size -= 16, now += 16) {
        uint64_t word[2];
        memcpy(word, now, 16);
        word[0] ^= value;
        value = 0;
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) value ^= rows[15 - k][word[0] >> 8 * k & 255] ^ rows[7 - k][word[1] >> 8 * k & 255];
    }
    for (; size > 0; size--) value = value >> 8 ^ rows[0][(value ^ *now++) & 255];
    return ~value;
}

}  // namespace dsr
