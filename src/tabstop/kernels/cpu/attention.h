// Attention over paged keys and values, in place.
//
// A layer's memory is [blocks][KV heads] of, for each 16 positions of the block: keys [dim / 2][16 positions][2] and values
// [8 pairs of positions][padded dim][2], all bfloat16: sixteen positions (or dimensions) are the lanes of one product of
// pairs. Positions are attended in spans of 256 whose parts are merged in order, whoever computed them: a query's result
// does not depend on what else is in the batch. The softmax is computed online (Milakov and Gimelshein, 2018).
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "machine.h"

namespace tabstop {

constexpr int SPAN = 256, SPAN_TILES = SPAN / LANES, MAX_QUERIES = 16;
constexpr float NOTHING = -1e30f;  // the largest score of no position

struct KVShape {
    int32_t num_heads, num_kv_heads, dim, block_size;

    int padded_dim() const { return (dim + LANES - 1) / LANES * LANES; }
    int group() const { return num_heads / num_kv_heads; }
    int64_t keys_per_tile() const { return int64_t(dim) * LANES; }
    int64_t tile_values() const { return keys_per_tile() + int64_t(padded_dim()) * LANES; }
    int64_t head_values() const { return block_size / LANES * tile_values(); }
    // Keys of the 16 positions from a slot on (a multiple of 16), of one head.
    int64_t tile(int64_t slot, int kv_head) const {
        return (slot / block_size * num_kv_heads + kv_head) * head_values() + slot % block_size / LANES * tile_values();
    }
};

// Rows of a step, as AttentionBatch has them.
struct Batch {
    int64_t num_tokens, num_rows, table_stride;
    const int32_t *query_starts, *contexts, *tables;
    const int64_t* kv_slots;
};

inline void store_position(const KVShape& shape, uint16_t* kv, int64_t slot, int kv_head, const float* key, const float* value) {
    int lane = int(slot % LANES);
    uint16_t* keys = kv + shape.tile(slot - lane, kv_head);
    uint16_t* values = keys + shape.keys_per_tile();
    for (int d = 0; d < shape.dim; d++) keys[d / 2 * 2 * LANES + lane * 2 + d % 2] = to_bfloat(key[d]);
    values += lane / 2 * shape.padded_dim() * 2 + lane % 2;
    for (int d = 0; d < shape.dim; d++) values[d * 2] = to_bfloat(value[d]);
}

// Up to 16 queries of one row that share a key head: vector v is the row's token v / group, head v % group.
struct QueryTile {
    int32_t row, first, count;
    int32_t first_span, num_spans, last_position;
    int64_t partials;  // index of its first partial among those of one head; -1: one thread does all spans
};

struct Unit {
    int32_t tile, first_span, num_spans;
};

// What a span leaves: per query its largest score (times log2 e), the sum of its weights, and the weighted values.
struct Partial {
    float most[MAX_QUERIES], sum[MAX_QUERIES];
    float* values;  // [queries, padded dim]
};

struct AttentionPlan {
    std::vector<QueryTile> tiles;
    std::vector<Unit> units;
    int64_t num_partials;  // of one head
};

inline AttentionPlan plan_attention(const KVShape& shape, const Batch& batch, int window, int num_threads) {
    AttentionPlan plan{};
    int64_t num_spans = 0;
    for (int64_t row = 0; row < batch.num_rows; row++) {
        int num_queries = batch.query_starts[row + 1] - batch.query_starts[row];
        int start = batch.contexts[row] - num_queries, count = num_queries * shape.group();
        for (int first = 0; first < count; first += MAX_QUERIES) {
            QueryTile tile{int32_t(row), first, std::min(MAX_QUERIES, count - first), 0, 0, 0, -1};
            int oldest = start + first / shape.group();
            tile.last_position = start + (first + tile.count - 1) / shape.group();
            tile.first_span = window ? std::max(0, oldest - window + 1) / SPAN : 0;
            tile.num_spans = tile.last_position / SPAN + 1 - tile.first_span;
            num_spans += tile.num_spans;
            plan.tiles.push_back(tile);
        }
    }
    std::stable_sort(plan.tiles.begin(), plan.tiles.end(),
                     [](const QueryTile& a, const QueryTile& b) { return a.num_spans > b.num_spans; });
    // With few tiles, or one much longer than the others, threads share the spans of a tile.
    int64_t heads = shape.num_kv_heads, fair = std::max<int64_t>(1, num_spans * heads / (4 * num_threads));
    for (size_t index = 0; index < plan.tiles.size(); index++) {
        QueryTile& tile = plan.tiles[index];
        int step = num_threads > 1 && tile.num_spans > fair ? 1 : tile.num_spans;
        if (step < tile.num_spans) tile.partials = plan.num_partials, plan.num_partials += tile.num_spans;
        for (int span = 0; span < tile.num_spans; span += step)
            plan.units.push_back({int32_t(index), tile.first_span + span, std::min(step, tile.num_spans - span)});
    }
    return plan;
}

// One layer's attention of one step: everything that a unit needs.
struct Attending {
    const KVShape& shape;
    const Batch& batch;
    const uint16_t* kv;
    const uint16_t* queries;  // bfloat16 [tokens, heads, dim]
    float scale;
    int window;  // 0: none
};

struct SpanMemory {
    alignas(64) float scores[MAX_QUERIES][SPAN];
    alignas(64) uint32_t weights[MAX_QUERIES][SPAN / 2];  // pairs of bfloat16
    alignas(64) uint32_t queries[256 * MAX_QUERIES];      // [dim / 2][queries]
    std::vector<uint16_t> last_values;                    // of a tile that is not full: others' positions are zeroed
    std::vector<float> partial, result;
};

template <int COUNT>
inline void score_tile(const uint16_t* keys, const uint32_t* queries, int num_pairs, int stride, float (*scores)[SPAN]) {
    Floats sums[COUNT];
    for (int q = 0; q < COUNT; q++) sums[q] = all(0.0f);
    for (int pair = 0; pair < num_pairs; pair++) {
        Words key = load<Words>(keys + pair * 2 * LANES);
        for (int q = 0; q < COUNT; q++) sums[q] = add_pair_products(sums[q], key, queries[pair * stride + q]);
    }
    for (int q = 0; q < COUNT; q++) store(scores[q], sums[q]);
}

inline void score_queries(const uint16_t* keys, const uint32_t* queries, int num_pairs, int count, float (*scores)[SPAN]) {
    int q = 0;
    for (; q + 8 <= count; q += 8) score_tile<8>(keys, queries + q, num_pairs, count, scores + q);
    for (; q + 4 <= count; q += 4) score_tile<4>(keys, queries + q, num_pairs, count, scores + q);
    switch (count - q) {
        case 3: return score_tile<3>(keys, queries + q, num_pairs, count, scores + q);
        case 2: return score_tile<2>(keys, queries + q, num_pairs, count, scores + q);
        case 1: return score_tile<1>(keys, queries + q, num_pairs, count, scores + q);
        default: return;
    }
}

// values[q][d] += Σ weights · V over one tile, for COUNT queries and WIDTH · 16 dimensions.
template <int COUNT, int WIDTH>
inline void add_tile(const uint16_t* values, int padded_dim, const uint32_t (*weights)[SPAN / 2], int first_pair, float* to) {
    Floats sums[COUNT][WIDTH];
    for (int q = 0; q < COUNT; q++)
        for (int d = 0; d < WIDTH; d++) sums[q][d] = load<Floats>(to + q * padded_dim + d * LANES);
    for (int pair = 0; pair < LANES / 2; pair++) {
        Words value[WIDTH];
        for (int d = 0; d < WIDTH; d++) value[d] = load<Words>(values + pair * 2 * padded_dim + d * 2 * LANES);
        for (int q = 0; q < COUNT; q++)
            for (int d = 0; d < WIDTH; d++) sums[q][d] = add_pair_products(sums[q][d], value[d], weights[q][first_pair + pair]);
    }
    for (int q = 0; q < COUNT; q++)
        for (int d = 0; d < WIDTH; d++) store(to + q * padded_dim + d * LANES, sums[q][d]);
}

template <int WIDTH>
inline void add_queries(const uint16_t* values, int padded_dim, const uint32_t (*weights)[SPAN / 2], int first_pair, int count,
                        float* to) {
    int q = 0;
    for (; q + 4 <= count; q += 4) add_tile<4, WIDTH>(values, padded_dim, weights + q, first_pair, to + q * padded_dim);
    switch (count - q) {
        case 3: return add_tile<3, WIDTH>(values, padded_dim, weights + q, first_pair, to + q * padded_dim);
        case 2: return add_tile<2, WIDTH>(values, padded_dim, weights + q, first_pair, to + q * padded_dim);
        case 1: return add_tile<1, WIDTH>(values, padded_dim, weights + q, first_pair, to + q * padded_dim);
        default: return;
    }
}

inline const uint16_t* keys_of(const Attending& work, const QueryTile& tile, int kv_head, int64_t position) {
    int64_t block = work.batch.tables[tile.row * work.batch.table_stride + position / work.shape.block_size];
    return work.kv + work.shape.tile(block * work.shape.block_size + position % work.shape.block_size, kv_head);
}

inline void pack_queries(const Attending& work, const QueryTile& tile, int kv_head, SpanMemory& memory) {
    const KVShape& shape = work.shape;
    for (int q = 0; q < tile.count; q++) {
        int vector = tile.first + q, head = kv_head * shape.group() + vector % shape.group();
        int64_t token = work.batch.query_starts[tile.row] + vector / shape.group();
        const uint16_t* from = work.queries + (token * shape.num_heads + head) * shape.dim;
        for (int pair = 0; pair < shape.dim / 2; pair++) std::memcpy(memory.queries + pair * tile.count + q, from + 2 * pair, 4);
    }
}

// Scores of query q → weights, its largest score and their sum. `seen` are the positions [first, last) of the span.
inline void weigh(float* scores, uint32_t* weights, float scale, int first, int last, float& most, float& sum) {
    Ints lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    Floats best = all(NOTHING), sums = all(0.0f);
    int end = (last + LANES - 1) / LANES * LANES;
    for (int at = first / LANES * LANES; at < end; at += LANES) {
        Floats values = load<Floats>(scores + at) * scale;
        if (at < first || at + LANES > last) {
            Ints places = lanes + at;
            values = ((places >= first) & (places < last)) ? values : all(NOTHING);
        }
        store(scores + at, values);
        best = larger(best, values);
    }
    most = last > first ? largest(best) : NOTHING;
    std::memset(weights, 0, first / LANES * LANES * 2);
    for (int at = first / LANES * LANES; at < end; at += LANES) {
        Floats values = power_of_two(load<Floats>(scores + at) - most);
        if (at < first || at + LANES > last) {
            Ints places = lanes + at;
            values = ((places >= first) & (places < last)) ? values : all(0.0f);
        }
        sums += values;
        uint16_t* halves = (uint16_t*)weights + at;
#if defined(TABSTOP_AVX512) && defined(__AVX512BF16__)
        __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
        std::memcpy(halves, &rounded, 32);
#else
        for (int i = 0; i < LANES; i++) halves[i] = to_bfloat(values[i]);
#endif
    }
    sum = total(sums);
}

// One span of one tile and head → a partial result.
inline void attend_span(const Attending& work, const QueryTile& tile, int kv_head, int span, SpanMemory& memory, Partial& partial) {
    const KVShape& shape = work.shape;
    int64_t base = int64_t(span) * SPAN;
    int num_seen = int(std::min<int64_t>(SPAN, tile.last_position + 1 - base)), num_tiles = (num_seen + LANES - 1) / LANES;
    int start = work.batch.contexts[tile.row] - (work.batch.query_starts[tile.row + 1] - work.batch.query_starts[tile.row]);
    int padded = shape.padded_dim();
    for (int t = 0; t < num_tiles; t++) {
        const uint16_t* keys = keys_of(work, tile, kv_head, base + t * LANES);
        if (t + 1 < num_tiles) {  // into the second-level cache: the machine follows a tile by itself, not to the next one
            const uint16_t* next = keys_of(work, tile, kv_head, base + (t + 1) * LANES);
            for (int64_t at = 0; at < shape.tile_values(); at += 32) __builtin_prefetch(next + at, 0, 2);
        }
        score_queries(keys, memory.queries, shape.dim / 2, tile.count, (float(*)[SPAN])(&memory.scores[0][0] + t * LANES));
    }
    for (int q = 0; q < tile.count; q++) {
        int64_t position = start + (tile.first + q) / shape.group();
        int64_t last = std::max<int64_t>(0, std::min<int64_t>(SPAN, position + 1 - base));
        int64_t first = work.window ? std::min(last, std::max<int64_t>(0, position + 1 - work.window - base)) : 0;
        weigh(memory.scores[q], memory.weights[q], work.scale * LOG2E, int(first), int(last), partial.most[q], partial.sum[q]);
        int end = int(last + LANES - 1) / LANES * LANES;
        std::memset((uint16_t*)memory.weights[q] + end, 0, std::max(0, num_tiles * LANES - end) * 2);
    }
    std::memset(partial.values, 0, size_t(tile.count) * padded * sizeof(float));
    for (int t = 0; t < num_tiles; t++) {
        const uint16_t* values = keys_of(work, tile, kv_head, base + t * LANES) + shape.keys_per_tile();
        int num_own = num_seen - t * LANES;
        if (num_own < LANES) {  // what lies behind may be anything, and 0 · NaN is NaN
            memory.last_values.assign(size_t(padded) * LANES, 0);
            for (int lane = 0; lane < num_own; lane++)
                for (int d = 0; d < shape.dim; d++) {
                    int64_t place = lane / 2 * padded * 2 + d * 2 + lane % 2;
                    memory.last_values[place] = values[place];
                }
            values = memory.last_values.data();
        }
        int d = 0;
        for (; d + 4 * LANES <= padded; d += 4 * LANES)
            add_queries<4>(values + 2 * d, padded, memory.weights, t * LANES / 2, tile.count, partial.values + d);
        for (; d < padded; d += LANES)
            add_queries<1>(values + 2 * d, padded, memory.weights, t * LANES / 2, tile.count, partial.values + d);
    }
}

// The running result of a tile, and one more span's part.
inline void merge(const Partial& part, Partial& whole, int count, int padded_dim) {
    for (int q = 0; q < count; q++) {
        float most = std::max(whole.most[q], part.most[q]);
        Floats factors = power_of_two(Floats{whole.most[q] - most, part.most[q] - most});
        float old = whole.sum[q] > 0 ? factors[0] : 0.0f, added = part.sum[q] > 0 ? factors[1] : 0.0f;
        whole.most[q] = most;
        whole.sum[q] = whole.sum[q] * old + part.sum[q] * added;
        for (int d = 0; d < padded_dim; d += LANES) {
            float* place = whole.values + q * padded_dim + d;
            Floats values = load<Floats>(place) * old;
            store(place, multiply_add(load<Floats>(part.values + q * padded_dim + d), all(added), values));
        }
    }
}

inline void clear(Partial& whole, int count, int padded_dim) {
    for (int q = 0; q < count; q++) whole.most[q] = NOTHING, whole.sum[q] = 0;
    std::memset(whole.values, 0, size_t(count) * padded_dim * sizeof(float));
}

// Divides by the sums; a query that sees nothing gets zeros.
inline void finish(Partial& whole, int count, int padded_dim) {
    for (int q = 0; q < count; q++) {
        float inverse = whole.sum[q] > 0 ? 1.0f / whole.sum[q] : 0.0f;
        for (int d = 0; d < padded_dim; d += LANES) {
            float* place = whole.values + q * padded_dim + d;
            store(place, load<Floats>(place) * inverse);
        }
    }
}

}  // namespace tabstop
