// The library's face: plain C, called through ctypes (library.py). Knows no torch and no Python.

#include "pack.h"
#include "step.h"

using namespace tabstop;

// No exception may reach Python: whether there was memory enough.
template <typename Work> static bool has_memory(const Work& work) {
    try {
        work();
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

extern "C" {

const char* tabstop_machine() { return machine_name(); }

// Stored rows → rows [first_row, first_row + num_rows) of a matrix whose tiles are zero there.
void tabstop_pack(const Matrix* matrix, uint8_t* tiles, const uint8_t* stored, int32_t encoding, int64_t row_bytes,
                  const int64_t* rows, int32_t num_threads) {
    const int64_t first_row = rows[0], num_rows = rows[1], groups = matrix->num_groups();
    const int64_t first_tile = first_row / ROWS, last_tile = (first_row + num_rows + ROWS - 1) / ROWS;
    Team::shared().run(num_threads, {int32_t(last_tile - first_tile)}, [&](int32_t, int32_t index) {
        uint8_t* tile = tiles + matrix->place(first_tile + index) * groups * matrix->tile_bytes();
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t row = (first_tile + index) * ROWS + r - first_row;
            if (row < 0 || row >= num_rows) continue;
            WeightGroup group;
            for (int64_t g = 0; g < groups; g++) {
                read_group(stored + row * row_bytes, Encoding(encoding), g, matrix->columns, group);
                write_group(group, matrix->bits, matrix->has_minima, int(r), tile + g * matrix->tile_bytes());
            }
        }
    });
}

// x [num_rows, columns] → y [num_rows, rows] = x W^T + bias (null: none).
bool tabstop_multiply(const Matrix* matrix, const float* x, int64_t num_rows, const float* bias, float* y, int32_t num_threads) {
    return has_memory([&] {
        static thread_local InputsMemory memory;
        const Inputs& inputs = memory.at_least(num_rows, matrix->columns);
        MultiplyChunk multiply = multiplier(*matrix);
        Output output{*matrix, bias, y, matrix->rows, false, 1.0f};
        Team::shared().run(num_threads, {int32_t(num_rows), int32_t(matrix->num_row_tiles())}, [&](int32_t phase, int32_t item) {
            if (phase == 0) return quantize_row(x + item * matrix->columns, matrix->columns, inputs, item);
            linear_tile(output, multiply, inputs, num_rows, item);
        });
    });
}

// x [num_rows, columns] → y [num_rows, rows / 2] = silu(first half of the product) · second half; rows / 2 is a multiple of 32.
bool tabstop_multiply_gated(const Matrix* matrix, const float* x, int64_t num_rows, const float* bias, float* y, int32_t num_threads) {
    return has_memory([&] {
        static thread_local InputsMemory memory;
        const Inputs& inputs = memory.at_least(num_rows, matrix->columns);
        Activated activated{*matrix, bias, SILU, true};
        const int64_t size = activated.size();
        Team::shared().run(num_threads, {int32_t(num_rows), int32_t(size / GROUP)}, [&](int32_t phase, int32_t item) {
            if (phase == 0) return quantize_row(x + item * matrix->columns, matrix->columns, inputs, item);
            activated.run(multiplier(*matrix), inputs, num_rows, item, [&](int64_t row, const float* values) {
                std::memcpy(y + row * size + int64_t(item) * GROUP, values, GROUP * sizeof(float));
            });
        });
    });
}

void tabstop_gather(const Matrix* matrix, const int64_t* ids, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i++) gather_row(*matrix, ids[i], to + i * matrix->columns);
}

void* tabstop_program(const Operation* operations, int32_t count, const KVShape* shape, const int64_t* widths,
                      const int32_t* num_buffers) {
    return new (std::nothrow) Program(operations, count, *shape, widths, num_buffers[0], widths + num_buffers[0], num_buffers[1]);
}

bool tabstop_run(void* program, const Step* step) {
    return has_memory([&] { static_cast<Program*>(program)->run(*step); });
}

void tabstop_free(void* program) { delete static_cast<Program*>(program); }
}
