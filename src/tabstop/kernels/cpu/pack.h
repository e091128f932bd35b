// GGUF's blocks and plain floats → tiles (matrix.h). Exact where a block's integers fit the tile's format; anything else is
// rounded to 8 bits with a scale for every 32 values. The layouts of the blocks are those of the GGUF format.
#pragma once

#include "matrix.h"

namespace tabstop {

enum Encoding { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

// 32 weights: scale · (values - zero) + minimum.
struct WeightGroup {
    int values[GROUP];
    int zero;
    float scale, minimum;
};

inline float half_at(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return half_to_float(half);
}

// Integers of 8 bits for floats; the scale is rounded first, so that they answer to the one that is kept.
inline void round_group(const float* from, int count, WeightGroup& group) {
    float most = 0;
    bool is_finite = true;
    for (int i = 0; i < count; i++) {
        most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
        is_finite &= std::isfinite(from[i]);
    }
    group.zero = 128, group.minimum = 0;
    group.scale = is_finite ? half_to_float(float_to_half(most / 127.0f)) : NAN;  // a broken weight must show
    for (int i = 0; i < GROUP; i++) {
        float value = i < count && group.scale > 0 ? std::nearbyint(from[i] / group.scale) : 0.0f;
        group.values[i] = 128 + int(value > 127 ? 127 : value < -127 ? -127 : value);
    }
}

inline void unpack_nibbles(const uint8_t* from, int* values) {
    for (int i = 0; i < 16; i++) values[i] = from[i] & 15, values[i + 16] = from[i] >> 4;
}

inline void add_fifth(const uint8_t* from, int* values) {
    for (int i = 0; i < GROUP; i++) values[i] |= (from[i / 8] >> i % 8 & 1) << 4;
}

// Scale and minimum of part `index` of 8 of a Q4_K or Q5_K block: 6 bits each, in 12 bytes from byte 4 on.
inline void scale_and_minimum(const uint8_t* block, int index, WeightGroup& group) {
    const uint8_t* packed = block + 4;
    int scale, minimum;
    if (index < 4) {
        scale = packed[index] & 63, minimum = packed[index + 4] & 63;
    } else {
        scale = (packed[index + 4] & 15) | packed[index - 4] >> 6 << 4;
        minimum = packed[index + 4] >> 4 | packed[index] >> 6 << 4;
    }
    group.scale = half_at(block) * scale, group.minimum = -half_at(block + 2) * minimum, group.zero = 0;
}

inline void read_q4_k(const uint8_t* block, int index, WeightGroup& group) {
    scale_and_minimum(block, index, group);
    const uint8_t* nibbles = block + 16 + index / 2 * 32;
    for (int i = 0; i < GROUP; i++) group.values[i] = nibbles[i] >> (index % 2 ? 4 : 0) & 15;
}

inline void read_q5_k(const uint8_t* block, int index, WeightGroup& group) {
    scale_and_minimum(block, index, group);
    const uint8_t* nibbles = block + 48 + index / 2 * 32;
    for (int i = 0; i < GROUP; i++)
        group.values[i] = (nibbles[i] >> (index % 2 ? 4 : 0) & 15) | (block[16 + i] >> index & 1) << 4;
}

inline void read_q6_k(const uint8_t* block, int index, float* to) {
    const uint8_t *low = block + index / 4 * 64 + index % 2 * 32, *high = block + 128 + index / 4 * 32;
    const int8_t* scales = (const int8_t*)block + 192 + index * 2;
    float scale = half_at(block + 208);
    for (int i = 0; i < GROUP; i++) {
        int value = (low[i] >> (index % 4 < 2 ? 0 : 4) & 15) | (high[i] >> index % 4 * 2 & 3) << 4;
        to[i] = scale * scales[i / 16] * float(value - 32);
    }
}

inline void read_q2_k(const uint8_t* block, int index, float* to) {
    const uint8_t* packed = block + 16 + index / 4 * 32;
    for (int i = 0; i < GROUP; i++) {
        uint8_t both = block[index * 2 + i / 16];
        to[i] = half_at(block + 80) * (both & 15) * float(packed[i] >> index % 4 * 2 & 3) - half_at(block + 82) * (both >> 4);
    }
}

inline void read_q3_k(const uint8_t* block, int index, float* to) {
    const uint8_t *packed = block + 32 + index / 4 * 32, *scales = block + 96;
    for (int i = 0; i < GROUP; i++) {
        int part = index * 2 + i / 16;
        int scale = (scales[part % 8] >> (part < 8 ? 0 : 4) & 15) | (scales[8 + part % 4] >> part / 4 * 2 & 3) << 4;
        int value = (packed[i] >> index % 4 * 2 & 3) - (block[i] >> index & 1 ? 0 : 4);
        to[i] = half_at(block + 108) * float(scale - 32) * float(value);
    }
}

inline void read_floats(const uint8_t* row, Encoding encoding, int64_t first, int count, float* to) {
    for (int i = 0; i < count; i++) {
        if (encoding == F32) {
            std::memcpy(to + i, row + 4 * (first + i), 4);
            continue;
        }
        uint16_t bits;
        std::memcpy(&bits, row + 2 * (first + i), 2);
        uint32_t wide = uint32_t(bits) << 16;
        if (encoding == F16)
            to[i] = half_to_float(bits);
        else
            std::memcpy(to + i, &wide, 4);
    }
}

// Group `index` of a stored row of `columns` values.
inline void read_group(const uint8_t* row, Encoding encoding, int64_t index, int64_t columns, WeightGroup& group) {
    float wide[GROUP];
    int part = int(index % 8);
    group.minimum = 0, group.zero = 0;
    switch (encoding) {
        case Q4_0: row += index * 18, group.scale = half_at(row), group.zero = 8, unpack_nibbles(row + 2, group.values); return;
        case Q4_1: row += index * 20, group.scale = half_at(row), group.minimum = half_at(row + 2);
            return unpack_nibbles(row + 4, group.values);
        case Q5_0: row += index * 22, group.scale = half_at(row), group.zero = 16, unpack_nibbles(row + 6, group.values);
            return add_fifth(row + 2, group.values);
        case Q5_1: row += index * 24, group.scale = half_at(row), group.minimum = half_at(row + 2);
            unpack_nibbles(row + 8, group.values);
            return add_fifth(row + 4, group.values);
        case Q8_0: row += index * 34, group.scale = half_at(row), group.zero = 128;
            for (int i = 0; i < GROUP; i++) group.values[i] = 128 + int8_t(row[2 + i]);
            return;
        case Q4_K: return read_q4_k(row + index / 8 * 144, part, group);
        case Q5_K: return read_q5_k(row + index / 8 * 176, part, group);
        case Q2_K: read_q2_k(row + index / 8 * 84, part, wide); return round_group(wide, GROUP, group);
        case Q3_K: read_q3_k(row + index / 8 * 110, part, wide); return round_group(wide, GROUP, group);
        case Q6_K: read_q6_k(row + index / 8 * 210, part, wide); return round_group(wide, GROUP, group);
        default: break;
    }
    int count = int(columns - index * GROUP < GROUP ? columns - index * GROUP : GROUP);
    read_floats(row, encoding, index * GROUP, count, wide);
    round_group(wide, count, group);
}

// Writes row r of a tile. The integers keep their distance to zero where the tile has no minima.
inline void write_group(const WeightGroup& group, int bits, bool has_minima, int r, uint8_t* tile) {
    int shift = has_minima ? 0 : (1 << (bits - 1)) - group.zero;
    uint16_t scale = float_to_half(group.scale);
    std::memcpy(tile + bits * 64 + 2 * r, &scale, 2);
    if (has_minima) {
        uint16_t minimum = float_to_half(group.minimum - group.scale * float(group.zero));
        std::memcpy(tile + bits * 64 + 32 + 2 * r, &minimum, 2);
    }
    for (int column = 0; column < GROUP; column++) {
        int vector = column / 4, byte = 4 * r + column % 4, value = group.values[column] + shift;
        if (bits == 8) {
            tile[64 * vector + byte] = uint8_t(value);
            continue;
        }
        tile[64 * (vector % 4) + byte] |= uint8_t((value & 15) << (vector < 4 ? 0 : 4));
        if (bits == 5) tile[256 + 8 * vector + byte / 8] |= uint8_t((value >> 4 & 1) << byte % 8);
    }
}

}  // namespace tabstop
