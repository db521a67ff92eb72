// CRC-32 (the polynomial of zip and PNG), eight bytes at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace dsr {

struct ChecksumTables {
    uint32_t rows[8][256] = {};

    constexpr ChecksumTables() {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
            rows[0][i] = value;
        }
        // Row k is the effect of a byte that k other bytes follow.
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++) rows[k][i] = rows[k - 1][i] >> 8 ^ rows[0][rows[k - 1][i] & 255];
    }
};

inline uint32_t checksum(const void* bytes, int64_t size) {
    static constexpr ChecksumTables TABLES;
    const auto& rows = TABLES.rows;
    const uint8_t* now = (const uint8_t*)bytes;
    uint32_t value = ~0u;
    for (; size >= 8; size -= 8, now += 8) {
        uint64_t word;
        memcpy(&word, now, 8);
        word ^= value;
        value = 0;
        for (int k = 0; k < 8; k++) value ^= rows[7 - k][word >> 8 * k & 255];
    }
    for (; size > 0; size--) value = value >> 8 ^ rows[0][(value ^ *now++) & 255];
    return ~value;
}

}  // namespace dsr
