// Prints what every function of machine.h makes of the same pseudo-random values, a line each: its name and numbers.
#include "../../src/tabstop/kernels/cpu/machine.h"

#include <cstdio>
#include <limits>

using namespace tabstop;

uint32_t state = 1;

uint32_t random_bits() { return state = state * 1664525u + 1013904223u, state ^ state >> 15; }

float random_float() { return float(int32_t(random_bits())) / float(1 << 28); }

template <typename Vector> void show(const char* name, Vector vector) {
    std::printf("%s", name);
    for (size_t i = 0; i < sizeof vector / sizeof vector[0]; i++) std::printf(" %.9g", double(vector[i]));
    std::printf("\n");
}

void show_one(const char* name, double value) { std::printf("%s %.9g\n", name, value); }

Floats random_floats() {
    Floats result;
    for (int i = 0; i < LANES; i++) result[i] = random_float();
    return result;
}

Bytes random_bytes(uint8_t mask) {
    Bytes result;
    for (int i = 0; i < 64; i++) result[i] = uint8_t(random_bits() >> 9) & mask;
    return result;
}

template <int BITS> void products(uint8_t mask) {
    int8_t x[4];
    int32_t taken = 0;
    for (int8_t& each : x) each = int8_t(random_bits() >> 9), each = each == -128 ? -127 : each, taken += each;
    Bytes weights = random_bytes(mask);
    Ints sums = add_products<BITS>(all(int32_t(random_bits() >> 16)), weights, x);
    show(BITS == 8 ? "products8" : "products5", BITS == 8 && !has_signed_bytes ? sums - 128 * taken : sums);
}

int main() {
    std::printf("machine %s\n", machine_name());
    for (int round = 0; round < 50; round++) {
        Floats a = random_floats(), b = random_floats(), c = random_floats(), nan = a;
        nan[round % LANES] = std::numeric_limits<float>::quiet_NaN();
        show("multiply_add", multiply_add(a, b, c));
        show("larger", larger(a, b));
        show_one("are_numbers", are_numbers(a, b) + 2 * are_numbers(nan, b) + 4 * are_numbers(b, nan));
        show_one("largest", largest(a));
        show_one("total", total(a));
        show("to_floats", to_floats(__builtin_convertvector(a, Ints)));
        show("power_of_two", power_of_two(a * 20.0f));
        uint16_t halves[LANES];
        for (uint16_t& half : halves) half = float_to_half(random_float() * 1e-5f * float(1 << round % 30));
        show("load_halves", load_halves((const uint8_t*)halves));
        Words pairs;
        for (int i = 0; i < LANES; i++) pairs[i] = to_bfloat(a[i]) | uint32_t(to_bfloat(b[i])) << 16;
        show("pairs", add_pair_products(a, pairs, to_bfloat(c[0]) | uint32_t(to_bfloat(c[1])) << 16));
        Bytes bytes = random_bytes(255), bits = random_bytes(255);
        show("low_nibbles", low_nibbles(bytes));
        show("high_nibbles", high_nibbles(bytes));
        show("fifth_bits", add_fifth_bits(low_nibbles(bytes), (const uint8_t*)&bits));
        products<5>(31);
        products<8>(255);
        store_some((float*)&c, a, 1 + round % LANES);
        show("store_some", c);
    }
}
