// Matrices of small integers, and inputs of 8 bits with a scale for every 32 values.
//
// A matrix is stored in tiles of 16 rows and 32 columns, row of tiles by row of tiles. A tile holds 32 · 16 unsigned
// integers, then 16 scales and, where the format has them, 16 minima (float16): a weight is scale · (q - offset) or
// scale · q + minimum. Vector j of a tile's integers holds columns 4j to 4j + 3: byte 4r + t is row r, column 4j + t. Of 4
// and 5 bits, the high half of a byte is column 16 + 4j + t; the fifth bits follow, 64 for each of the eight vectors.
#pragma once

#include "machine.h"

namespace tabstop {

constexpr int ROWS = 16, GROUP = 32, CHUNK = 16;

struct Matrix {
    const uint8_t* tiles;
    int64_t rows, columns;  // as the model has them; tiles are padded to whole ones with zeros
    int32_t bits, has_minima;
    int32_t has_halves;  // two rows of tiles of the first half of the rows lie before their two of the second, and so on

    int64_t num_groups() const { return (columns + GROUP - 1) / GROUP; }
    int64_t num_row_tiles() const { return (rows + ROWS - 1) / ROWS; }
    int64_t tile_bytes() const { return bits * 64 + 32 + 32 * has_minima; }
    // Where row of tiles `index` lies. Gate and up are read together, so they lie together: one stream from memory.
    int64_t place(int64_t index) const {
        int64_t half = num_row_tiles() / 2, own = index < half ? index : index - half;
        return has_halves ? own / 2 * 4 + own % 2 + (index < half ? 0 : 2) : index;
    }
    const uint8_t* row_tile(int64_t index) const { return tiles + place(index) * num_groups() * tile_bytes(); }
};

// Rows of inputs in chunks of 16; in a chunk, group by group, so that what one tile meets lies together.
struct Inputs {
    int8_t* values;  // [chunks, groups, 16, 32]
    float* scales;   // [chunks, groups, 16]
    float* scaled_sums;
    int32_t* sums;  // of a group's integers
    int64_t num_groups;

    int64_t place(int64_t row, int64_t group) const { return (row / CHUNK * num_groups + group) * CHUNK + row % CHUNK; }
};

// 32 floats → integers from -127 to 127 times a scale. What is no number stays none: of an infinity the scale is infinite
// and all integers are 0; a NaN would be lost where the largest is looked for.
inline void quantize_group(const float* from, const Inputs& to, int64_t row, int64_t group) {
    Floats low = load<Floats>(from), high = load<Floats>(from + LANES);
    float most = largest(larger(larger(low, -low), larger(high, -high)));
    float inverse = most > 0 ? 127.0f / most : 0.0f, scale = are_numbers(low, high) ? most / 127.0f : NAN;
    int64_t place = to.place(row, group);
    int8_t* target = to.values + place * GROUP;
#if defined(TABSTOP_AVX512)
    __m512i first = _mm512_cvtps_epi32((__m512)(low * inverse)), second = _mm512_cvtps_epi32((__m512)(high * inverse));
    _mm_storeu_si128((__m128i*)target, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128((__m128i*)(target + LANES), _mm512_cvtepi32_epi8(second));
    int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
#else
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t value = int32_t(std::nearbyint((i < LANES ? low[i] : high[i - LANES]) * inverse));
        target[i] = int8_t(value);
        sum += value;
    }
#endif
    to.scales[place] = scale;
    to.sums[place] = sum;
    to.scaled_sums[place] = scale * float(sum);
}

inline void quantize_row(const float* from, int64_t count, const Inputs& to, int64_t row) {
    int64_t group = 0;
    for (; (group + 1) * GROUP <= count; group++) quantize_group(from + group * GROUP, to, row, group);
    if (group * GROUP < count) {
        float rest[GROUP] = {};
        std::memcpy(rest, from + group * GROUP, (count - group * GROUP) * sizeof(float));
        quantize_group(rest, to, row, group);
    }
}

template <int BITS> struct Unpacked { Bytes vectors[8]; };

template <int BITS> inline Unpacked<BITS> unpack(const uint8_t* tile) {
    Unpacked<BITS> result;
    if (BITS == 8) {
        for (int j = 0; j < 8; j++) result.vectors[j] = load<Bytes>(tile + 64 * j);
        return result;
    }
    for (int j = 0; j < 4; j++) {
        Bytes packed = load<Bytes>(tile + 64 * j);
        result.vectors[j] = low_nibbles(packed);
        result.vectors[j + 4] = high_nibbles(packed);
    }
    if (BITS == 5)
        for (int j = 0; j < 8; j++) result.vectors[j] = add_fifth_bits(result.vectors[j], tile + 256 + 8 * j);
    return result;
}

// One row of tiles times M rows of inputs from `first` on, all of one chunk: results[m] are 16 outputs.
template <int BITS, bool MINIMA, int M>
inline void multiply_tiles(const Matrix& matrix, int64_t row_tile, const Inputs& inputs, int64_t first, Floats* results) {
    constexpr int64_t DATA = BITS * 64, TILE = DATA + 32 + 32 * MINIMA;
    constexpr int32_t INITIAL = (MINIMA ? 0 : -(1 << (BITS - 1))) + (BITS == 8 && has_signed_bytes ? 128 : 0);
    const uint8_t* tile = matrix.row_tile(row_tile);
    Floats totals[M];
    for (int m = 0; m < M; m++) totals[m] = all(0.0f);
    int64_t place = inputs.place(first, 0);
    for (int64_t group = 0; group < inputs.num_groups; group++, tile += TILE, place += CHUNK) {
        if (M > 2)
            for (int64_t line = 0; line < TILE; line += 64) fetch_ahead(tile + 8 * TILE + line);
        Unpacked<BITS> weights = unpack<BITS>(tile);
        Floats scales = load_halves(tile + DATA);
        const int8_t* x = inputs.values + place * GROUP;
        for (int m = 0; m < M; m++) {
            Ints sums = all(INITIAL ? INITIAL * inputs.sums[place + m] : 0);
            for (int j = 0; j < 8; j++) sums = add_products<BITS>(sums, weights.vectors[j], x + m * GROUP + 4 * j);
            totals[m] = multiply_add(to_floats(sums) * inputs.scales[place + m], scales, totals[m]);
        }
        if (MINIMA) {
            Floats minima = load_halves(tile + DATA + 32);
            for (int m = 0; m < M; m++)
                totals[m] = multiply_add(all(inputs.scaled_sums[place + m]), minima, totals[m]);
        }
    }
    for (int m = 0; m < M; m++) results[m] = totals[m];
}

// As multiply_tiles, for up to 16 rows of inputs; results beyond `count` are undefined.
template <int BITS, bool MINIMA>
void multiply_chunk(const Matrix& matrix, int64_t row_tile, const Inputs& inputs, int64_t first, int count, Floats* results) {
    if (count == 1) return multiply_tiles<BITS, MINIMA, 1>(matrix, row_tile, inputs, first, results);
    if (count == 2) return multiply_tiles<BITS, MINIMA, 2>(matrix, row_tile, inputs, first, results);
    if (count <= 4) return multiply_tiles<BITS, MINIMA, 4>(matrix, row_tile, inputs, first, results);
    if (count <= 6) return multiply_tiles<BITS, MINIMA, 6>(matrix, row_tile, inputs, first, results);
    if (count <= 8) return multiply_tiles<BITS, MINIMA, 8>(matrix, row_tile, inputs, first, results);
    if (count <= 12) return multiply_tiles<BITS, MINIMA, 12>(matrix, row_tile, inputs, first, results);
    multiply_tiles<BITS, MINIMA, 16>(matrix, row_tile, inputs, first, results);
}

typedef void (*MultiplyChunk)(const Matrix&, int64_t, const Inputs&, int64_t, int, Floats*);

inline MultiplyChunk multiplier(const Matrix& matrix) {
    if (matrix.bits == 4) return matrix.has_minima ? multiply_chunk<4, true> : multiply_chunk<4, false>;
    if (matrix.bits == 5) return matrix.has_minima ? multiply_chunk<5, true> : multiply_chunk<5, false>;
    return matrix.has_minima ? multiply_chunk<8, true> : multiply_chunk<8, false>;
}

// One row of the matrix as floats.
inline void gather_row(const Matrix& matrix, int64_t row, float* to) {
    const uint8_t* tile = matrix.row_tile(row / ROWS);
    int64_t r = row % ROWS, data = matrix.bits * 64;
    int offset = matrix.has_minima ? 0 : 1 << (matrix.bits - 1);
    for (int64_t first = 0; first < matrix.columns; first += GROUP, tile += matrix.tile_bytes()) {
        uint16_t halves[2] = {};
        std::memcpy(halves, tile + data + 2 * r, 2);
        if (matrix.has_minima) std::memcpy(halves + 1, tile + data + 32 + 2 * r, 2);
        float scale = half_to_float(halves[0]), minimum = half_to_float(halves[1]);
        int64_t count = matrix.columns - first < GROUP ? matrix.columns - first : GROUP;
        for (int64_t column = 0; column < count; column++) {
            int64_t vector = column / 4, byte = 4 * r + column % 4;
            int value;
            if (matrix.bits == 8)
                value = tile[64 * vector + byte];
            else {
                value = tile[64 * (vector % 4) + byte] >> (vector < 4 ? 0 : 4) & 15;
                if (matrix.bits == 5) value |= (tile[256 + 8 * vector + byte / 8] >> (byte % 8) & 1) << 4;
            }
            to[first + column] = scale * float(value - offset) + minimum;
        }
    }
}

}  // namespace tabstop
