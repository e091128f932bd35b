// A step: a flat list of operations that Python wrote once, worked off phase by phase (team.h).
#pragma once

#include <cstdlib>
#include <ctime>
#include <new>

#include "attention.h"
#include "matrix.h"
#include "team.h"

namespace tabstop {

enum Kind { NORM, LINEAR, STORE, ATTEND, ROUND };
enum NormKind { RMS, LAYER };
enum Target { FLOATS, ADD, INTEGERS, GATED };  // what becomes of a result
enum Activation { NONE, SILU, GELU, GELU_TANH, RELU };

// As ctypes declares it (kernels/cpu/library.py, where `from` is `source`); which fields count depends on the kind.
struct Operation {
    int32_t kind, target, activation, norm, layer, window;
    int32_t from, to;  // numbers of buffers of floats or of integers
    float eps, factor;
    const Matrix* matrix;
    const float *weight, *bias;         // of a norm, or a matrix's bias
    const float *query_norm, *key_norm;  // of the heads; null: none
};

struct Step {
    int64_t num_tokens, num_rows, table_stride;
    const int64_t* positions;
    const int64_t* kv_slots;
    const int32_t *query_starts, *contexts, *tables;
    const float *cosines, *sines;  // [positions, dim / 2]; null: heads are not turned
    const float* query_scales;     // [positions]; null: 1
    uint16_t* const* kv;           // one per layer
    float* x;                      // [tokens, width 0] the residual stream; ends as what the last operation leaves
    int32_t num_threads;
    double* seconds;  // [operations] of the first thread, added up; null: not measured
};

inline Floats activate(Floats x, int32_t activation) {
    switch (activation) {
        case SILU: return x / (1.0f + exponential(-x));
        case RELU: return larger(x, all(0.0f));
        case GELU_TANH: {
            Floats inner = x * (0.7978845608f + 0.0356774081f * x * x);
            return x - x / (1.0f + exponential(inner + inner));
        }
        case GELU:
            for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
            return x;
        default: return x;
    }
}

// Memory that grows. Throws std::bad_alloc.
class Aligned {
  public:
    ~Aligned() { std::free(memory_); }
    template <typename Value> Value* at_least(size_t count) {
        size_t bytes = (count * sizeof(Value) + 4095) / 4096 * 4096;
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(4096, bytes), bytes_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
            std::memset(memory_, 0, bytes);
        }
        return (Value*)memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

struct InputsMemory {
    Aligned values, scales, scaled_sums, sums;
    Inputs inputs{};

    const Inputs& at_least(int64_t rows, int64_t columns) {
        int64_t groups = (columns + GROUP - 1) / GROUP, places = (rows + CHUNK - 1) / CHUNK * groups * CHUNK;
        inputs = {values.at_least<int8_t>(places * GROUP), scales.at_least<float>(places), scaled_sums.at_least<float>(places),
                  sums.at_least<int32_t>(places), groups};
        return inputs;
    }
};

inline void norm_row(const Operation& op, const float* x, int64_t size, float* to) {
    Floats sums = all(0.0f), squares = all(0.0f);
    int64_t at = 0;
    float sum = 0, square = 0;
    for (; at + LANES <= size; at += LANES) {
        Floats values = load<Floats>(x + at);
        sums += values, squares = multiply_add(values, values, squares);
    }
    for (int64_t i = at; i < size; i++) sum += x[i], square += x[i] * x[i];
    sum += total(sums), square += total(squares);
    float mean = 0;
    if (op.norm == LAYER) {
        mean = sum / size, square = 0, squares = all(0.0f);
        for (at = 0; at + LANES <= size; at += LANES) {
            Floats values = load<Floats>(x + at) - mean;
            squares = multiply_add(values, values, squares);
        }
        for (int64_t i = at; i < size; i++) square += (x[i] - mean) * (x[i] - mean);
        square += total(squares);
    }
    float inverse = 1.0f / std::sqrt(square / size + op.eps);
    for (int64_t i = 0; i < size; i++) to[i] = (x[i] - mean) * inverse * op.weight[i];
    if (op.bias)
        for (int64_t i = 0; i < size; i++) to[i] += op.bias[i];
}

// What a linear operation does with 16 outputs of up to 16 rows of inputs.
struct Output {
    const Matrix& matrix;
    const float* bias;
    float* to;  // [rows of inputs, stride]
    int64_t stride;
    bool adds;
    float factor;

    void put(int64_t row_tile, int64_t first, int count, Floats* results) const {
        int64_t column = row_tile * ROWS;
        int width = int(std::min<int64_t>(ROWS, matrix.rows - column));
        Floats own = all(0.0f);
        if (bias) std::memcpy(&own, bias + column, width * sizeof(float));
        for (int m = 0; m < count; m++) {
            Floats values = results[m] + own, old = all(0.0f);
            float* place = to + (first + m) * stride + column;
            if (adds) {
                std::memcpy(&old, place, width * sizeof(float));
                values = multiply_add(values, all(factor), old);
            }
            store_some(place, values, width);
        }
    }
};

inline void linear_tile(const Output& output, MultiplyChunk multiply, const Inputs& inputs, int64_t num_rows, int64_t row_tile) {
    Floats results[CHUNK];
    for (int64_t first = 0; first < num_rows; first += CHUNK) {
        int count = int(std::min<int64_t>(CHUNK, num_rows - first));
        multiply(output.matrix, row_tile, inputs, first, count, results);
        output.put(row_tile, first, count, results);
    }
}

// 32 outputs, activated (times those of the second half of the rows where `gated`), as integers or as floats.
struct Activated {
    const Matrix& matrix;
    const float* bias;
    int32_t activation;
    bool gated;

    int64_t size() const { return gated ? matrix.rows / 2 : matrix.rows; }

    template <typename Put> void run(MultiplyChunk multiply, const Inputs& inputs, int64_t num_rows, int64_t group, const Put& put) const {
        Floats results[2][2][CHUNK];
        for (int64_t first = 0; first < num_rows; first += CHUNK) {
            int count = int(std::min<int64_t>(CHUNK, num_rows - first));
            for (int part = 0; part <= int(gated); part++)
                for (int half = 0; half < 2; half++) {
                    int64_t row_tile = part * size() / ROWS + group * 2 + half;
                    multiply(matrix, row_tile, inputs, first, count, results[part][half]);
                    if (bias)
                        for (int m = 0; m < count; m++) results[part][half][m] += load<Floats>(bias + row_tile * ROWS);
                }
            for (int m = 0; m < count; m++) {
                float values[GROUP];
                for (int half = 0; half < 2; half++) {
                    Floats value = activate(results[0][half][m], activation);
                    store(values + half * LANES, gated ? value * results[1][half][m] : value);
                }
                put(first + m, values);
            }
        }
    }
};

class Program {
  public:
    Program(const Operation* operations, int32_t count, const KVShape& shape, const int64_t* float_widths, int32_t num_floats,
            const int64_t* integer_widths, int32_t num_integers)
        : operations_(operations, operations + count), shape_(shape), float_widths_(float_widths, float_widths + num_floats),
          integer_widths_(integer_widths, integer_widths + num_integers), floats_(num_floats), integers_(num_integers) {}

    void run(const Step& step) {
        std::lock_guard<std::mutex> turn(turn_);
        Batch batch{step.num_tokens, step.num_rows, step.table_stride, step.query_starts, step.contexts, step.tables, step.kv_slots};
        allocate(step);
        plan(step, batch);
        std::vector<int32_t> counts;
        for (const Operation& op : operations_) counts.push_back(int32_t(num_items(op, step)));
        auto execute = [&](int32_t index, int32_t item) { run(operations_[index], step, batch, item); };
        if (!step.seconds) return Team::shared().run(step.num_threads, counts, execute);
        double start = now();
        Team::shared().run(step.num_threads, counts, execute, [&](int32_t index) {
            double end = now();
            step.seconds[index] += end - start, start = end;
        });
    }

  private:
    static double now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec + 1e-9 * time.tv_nsec;
    }

    void allocate(const Step& step) {
        for (size_t i = 0; i < floats_.size(); i++)
            float_places_.resize(floats_.size()), float_places_[i] = i ? floats_[i].at_least<float>(step.num_tokens * float_widths_[i]) : step.x;
        for (size_t i = 0; i < integers_.size(); i++) integers_[i].at_least(step.num_tokens, integer_widths_[i]);
        queries_ = query_memory_.at_least<uint16_t>(step.num_tokens * shape_.num_heads * shape_.dim);
    }

    void plan(const Step& step, const Batch& batch) {
        plans_.clear();
        for (const Operation& op : operations_) {
            if (op.kind != ATTEND || plan_of(op.window)) continue;
            plans_.push_back({op.window, plan_attention(shape_, batch, op.window, step.num_threads)});
        }
        int64_t most = 0, tiles = 0;
        for (auto& entry : plans_) {
            most = std::max(most, entry.second.num_partials);
            tiles = std::max<int64_t>(tiles, entry.second.tiles.size());
        }
        int64_t heads = shape_.num_kv_heads, width = MAX_QUERIES * (shape_.padded_dim() + 2);
        partials_ = partial_memory_.at_least<float>(most * heads * width);
        if (most && int64_t(finished_.size()) < tiles * heads) finished_ = std::vector<std::atomic<int32_t>>(tiles * heads);
    }

    const AttentionPlan* plan_of(int window) const {
        for (auto& entry : plans_)
            if (entry.first == window) return &entry.second;
        return nullptr;
    }

    int64_t num_items(const Operation& op, const Step& step) const {
        switch (op.kind) {
            case LINEAR: return op.target <= ADD ? op.matrix->num_row_tiles() : activated(op).size() / GROUP;
            case ATTEND: return int64_t(plan_of(op.window)->units.size()) * shape_.num_kv_heads;
            default: return step.num_tokens;
        }
    }

    void run(const Operation& op, const Step& step, const Batch& batch, int64_t item) {
        switch (op.kind) {
            case NORM: return norm(op, item);
            case LINEAR: return linear(op, step, item);
            case STORE: return store_heads(op, step, item);
            case ATTEND: return attend(op, step, batch, item);
            case ROUND:
                return quantize_row(float_places_[op.from] + item * float_widths_[op.from], float_widths_[op.from],
                                    integers_[op.to].inputs, item);
        }
    }

    void norm(const Operation& op, int64_t row) {
        int64_t size = float_widths_[op.from];
        thread_local std::vector<float> normed;
        normed.resize(size);
        norm_row(op, float_places_[op.from] + row * size, size, normed.data());
        if (op.target == INTEGERS) return quantize_row(normed.data(), size, integers_[op.to].inputs, row);
        float* to = float_places_[op.to] + row * size;
        for (int64_t i = 0; i < size; i++) to[i] = op.target == ADD ? to[i] + op.factor * normed[i] : normed[i];
    }

    static Activated activated(const Operation& op) { return {*op.matrix, op.bias, op.activation, op.target == GATED}; }

    void linear(const Operation& op, const Step& step, int64_t item) {
        const Inputs& inputs = integers_[op.from].inputs;
        MultiplyChunk multiply = multiplier(*op.matrix);
        if (op.target <= ADD) {
            Output output{*op.matrix, op.bias, float_places_[op.to], float_widths_[op.to], op.target == ADD, op.factor};
            return linear_tile(output, multiply, inputs, step.num_tokens, item);
        }
        const Inputs& to = integers_[op.to].inputs;
        activated(op).run(multiply, inputs, step.num_tokens, item,
                          [&](int64_t row, const float* values) { quantize_group(values, to, row, item); });
    }

    void store_heads(const Operation& op, const Step& step, int64_t token) {
        const int heads = shape_.num_heads, kv_heads = shape_.num_kv_heads, dim = shape_.dim;
        float* qkv = float_places_[op.from] + token * float_widths_[op.from];
        for (int head = 0; head < heads + kv_heads; head++) turn_head(op, step, token, head, qkv + head * dim);
        uint16_t* queries = queries_ + token * heads * dim;
        for (int i = 0; i < heads * dim; i++) queries[i] = to_bfloat(qkv[i]);
        for (int head = 0; head < kv_heads; head++) {
            const float* key = qkv + (heads + head) * dim;
            store_position(shape_, step.kv[op.layer], step.kv_slots[token], head, key, key + kv_heads * dim);
        }
    }

    void turn_head(const Operation& op, const Step& step, int64_t token, int head, float* x) {
        const int dim = shape_.dim, half = dim / 2;
        bool is_query = head < shape_.num_heads;
        const float* weight = is_query ? op.query_norm : op.key_norm;
        if (weight) {
            float square = 0;
            for (int i = 0; i < dim; i++) square += x[i] * x[i];
            float inverse = 1.0f / std::sqrt(square / dim + op.eps);
            for (int i = 0; i < dim; i++) x[i] = x[i] * inverse * weight[i];
        }
        if (!step.positions) return;
        int64_t position = step.positions[token];
        if (step.cosines) {
            const float *cosines = step.cosines + position * half, *sines = step.sines + position * half;
            for (int i = 0; i < half; i++) {
                float first = x[i], second = x[i + half];
                x[i] = first * cosines[i] - second * sines[i];
                x[i + half] = second * cosines[i] + first * sines[i];
            }
        }
        if (step.query_scales && is_query)
            for (int i = 0; i < dim; i++) x[i] *= step.query_scales[position];
    }

    void attend(const Operation& op, const Step& step, const Batch& batch, int64_t item) {
        thread_local SpanMemory memory;
        const AttentionPlan& plan = *plan_of(op.window);
        Attending work{shape_, batch, step.kv[op.layer], queries_, op.factor, op.window};
        int64_t heads = shape_.num_kv_heads;
        const Unit& unit = plan.units[item / heads];
        const QueryTile& tile = plan.tiles[unit.tile];
        int kv_head = int(item % heads), padded = shape_.padded_dim();
        memory.partial.resize(size_t(MAX_QUERIES) * padded), memory.result.resize(size_t(MAX_QUERIES) * padded);
        pack_queries(work, tile, kv_head, memory);
        Partial whole, part;
        whole.values = memory.result.data(), part.values = memory.partial.data();
        clear(whole, tile.count, padded);
        if (tile.partials < 0) {
            for (int span = 0; span < tile.num_spans; span++) {
                attend_span(work, tile, kv_head, unit.first_span + span, memory, part);
                merge(part, whole, tile.count, padded);
            }
        } else {
            keep(work, tile, unit, kv_head, memory);
            std::atomic<int32_t>& finished = finished_[unit.tile * heads + kv_head];
            if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 < tile.num_spans) return;
            finished.store(0, std::memory_order_relaxed);
            for (int span = 0; span < tile.num_spans; span++)
                merge(partial_at(tile.partials + span, kv_head), whole, tile.count, padded);
        }
        finish(whole, tile.count, padded);
        put(op, batch, tile, kv_head, whole);
    }

    // Where the partial result `index` of a head lies: largest scores, sums, values.
    Partial partial_at(int64_t index, int kv_head) const {
        int64_t padded = shape_.padded_dim(), width = MAX_QUERIES * (padded + 2);
        float* place = partials_ + (index * shape_.num_kv_heads + kv_head) * width;
        Partial part;
        part.values = place + 2 * MAX_QUERIES;
        std::memcpy(part.most, place, sizeof part.most);
        std::memcpy(part.sum, place + MAX_QUERIES, sizeof part.sum);
        return part;
    }

    void keep(const Attending& work, const QueryTile& tile, const Unit& unit, int kv_head, SpanMemory& memory) {
        Partial part = partial_at(tile.partials + unit.first_span - tile.first_span, kv_head);
        attend_span(work, tile, kv_head, unit.first_span, memory, part);
        float* place = part.values - 2 * MAX_QUERIES;
        std::memcpy(place, part.most, sizeof part.most);
        std::memcpy(place + MAX_QUERIES, part.sum, sizeof part.sum);
    }

    void put(const Operation& op, const Batch& batch, const QueryTile& tile, int kv_head, const Partial& whole) {
        int dim = shape_.dim, padded = shape_.padded_dim(), group = shape_.group();
        for (int q = 0; q < tile.count; q++) {
            int64_t token = batch.query_starts[tile.row] + (tile.first + q) / group;
            int head = kv_head * group + (tile.first + q) % group;
            const float* values = whole.values + q * padded;
            if (op.target == FLOATS)
                std::memcpy(float_places_[op.to] + token * float_widths_[op.to] + head * dim, values, dim * sizeof(float));
            else
                for (int d = 0; d < dim; d += GROUP)
                    quantize_group(values + d, integers_[op.to].inputs, token, (head * dim + d) / GROUP);
        }
    }

    std::mutex turn_;
    std::vector<Operation> operations_;
    KVShape shape_;
    std::vector<int64_t> float_widths_, integer_widths_;
    std::vector<Aligned> floats_;
    std::vector<InputsMemory> integers_;
    std::vector<float*> float_places_;
    Aligned query_memory_, partial_memory_;
    uint16_t* queries_ = nullptr;
    float* partials_ = nullptr;
    std::vector<std::pair<int, AttentionPlan>> plans_;
    std::vector<std::atomic<int32_t>> finished_;
};

}  // namespace tabstop
