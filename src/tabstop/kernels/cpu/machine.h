// What the machine offers, under one set of names: 16 floats, 16 integers or 64 bytes at a time.
//
// The types are the compiler's own vectors, so everything but the functions below compiles on any processor. Four
// versions of those: AVX-512 (with VNNI and BF16 where the compiler says so), AVX2, ARM's NEON (with its dot products and
// BF16 likewise), and plain loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(TABSTOP_PORTABLE)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define TABSTOP_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TABSTOP_AVX2 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define TABSTOP_NEON 1
#endif
#if defined(TABSTOP_AVX512) || defined(TABSTOP_AVX2)
#include <immintrin.h>
#elif defined(TABSTOP_NEON)
#include <arm_neon.h>
#endif

namespace tabstop {

typedef float Floats __attribute__((vector_size(64), aligned(64)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(64)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(64)));
typedef uint8_t Bytes __attribute__((vector_size(64), aligned(64)));

constexpr int LANES = 16;

inline const char* machine_name() {
#if defined(TABSTOP_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    return "avx512 vnni bf16";
#elif defined(TABSTOP_AVX512) && defined(__AVX512VNNI__)
    return "avx512 vnni";
#elif defined(TABSTOP_AVX512)
    return "avx512";
#elif defined(TABSTOP_AVX2)
    return "avx2";
#elif defined(TABSTOP_NEON) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return "neon dotprod bf16";
#elif defined(TABSTOP_NEON) && defined(__ARM_FEATURE_DOTPROD)
    return "neon dotprod";
#elif defined(TABSTOP_NEON)
    return "neon";
#else
    return "portable";
#endif
}

template <typename Vector> inline Vector load(const void* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

template <typename Vector> inline void store(void* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

inline Floats all(float value) { return Floats{} + value; }
inline Ints all(int32_t value) { return Ints{} + value; }

inline void store_some(float* to, Floats vector, int count) {
    if (count >= LANES) return store(to, vector);
    std::memcpy(to, &vector, count * sizeof(float));
}

#if defined(TABSTOP_NEON)
// A quarter of a vector, and back.
template <typename Quarter, typename Vector> inline Quarter quarter(const Vector& vector, int index) {
    Quarter result;
    std::memcpy(&result, (const char*)&vector + 16 * index, 16);
    return result;
}

template <typename Vector, typename Quarter> inline Vector joined(const Quarter (&quarters)[4]) {
    Vector result;
    std::memcpy(&result, quarters, 64);
    return result;
}
#endif

// a · b + c, rounded once wherever the processor can: all row counts must round alike.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(TABSTOP_AVX512)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TABSTOP_NEON)
    float32x4_t sums[4];
    for (int i = 0; i < 4; i++)
        sums[i] = vfmaq_f32(quarter<float32x4_t>(c, i), quarter<float32x4_t>(a, i), quarter<float32x4_t>(b, i));
    return joined<Floats>(sums);
#else
    return a * b + c;
#endif
}

inline Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

inline Floats larger(Floats a, Floats b) {
#if defined(TABSTOP_AVX512)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// Whether neither has a NaN.
inline bool are_numbers(Floats a, Floats b) {
#if defined(TABSTOP_AVX512)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) == 0;
#elif defined(TABSTOP_NEON)
    Ints equal = (a == a) & (b == b);  // -1 or 0
    int32x4_t all_equal = quarter<int32x4_t>(equal, 0);
    for (int i = 1; i < 4; i++) all_equal = vandq_s32(all_equal, quarter<int32x4_t>(equal, i));
    return vmaxvq_s32(all_equal) < 0;
#else
    for (int i = 0; i < LANES; i++)
        if (a[i] != a[i] || b[i] != b[i]) return false;
    return true;
#endif
}

inline float largest(Floats values) {
#if defined(TABSTOP_AVX512)
    return _mm512_reduce_max_ps((__m512)values);
#elif defined(TABSTOP_NEON)
    float32x4_t low = vmaxq_f32(quarter<float32x4_t>(values, 0), quarter<float32x4_t>(values, 1));
    float32x4_t high = vmaxq_f32(quarter<float32x4_t>(values, 2), quarter<float32x4_t>(values, 3));
    return vmaxvq_f32(vmaxq_f32(low, high));
#else
    float result = values[0];
    for (int i = 1; i < LANES; i++) result = values[i] > result ? values[i] : result;
    return result;
#endif
}

// In halves: the order is the same on every machine.
inline float total(Floats values) {
    float sums[LANES];
    store(sums, values);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

// ---- 16-bit floats

inline float half_to_float(uint16_t half) {
    uint32_t exponent = half >> 10 & 31, mantissa = half & 1023, sign = uint32_t(half & 0x8000) << 16, bits;
    if (exponent == 31)
        bits = sign | 0x7f800000 | mantissa << 13;
    else if (exponent)
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        float small = float(mantissa) * (1.0f / (1 << 24));
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// Rounded to nearest, ties to even; too large ones become the largest finite.
inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    float magnitude = std::fabs(value);
    if (!(magnitude < 65504.0f)) return magnitude != magnitude ? sign | 0x7e00 : sign | 0x7bff;
    if (magnitude < 6.103515625e-5f) return sign | uint16_t(std::nearbyint(magnitude * float(1 << 24)));
    std::memcpy(&bits, &magnitude, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | uint16_t((bits >> 13) - (112 << 10));
}

inline Floats load_halves(const uint8_t* from) {
#if defined(TABSTOP_AVX512)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(TABSTOP_AVX2)
    __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 16)));
    Floats result;
    std::memcpy(&result, &low, 32);
    std::memcpy((char*)&result + 32, &high, 32);
    return result;
#elif defined(TABSTOP_NEON)
    float32x4_t quarters[4];
    for (int i = 0; i < 4; i++) {
        float16x4_t halves;
        std::memcpy(&halves, from + 8 * i, 8);
        quarters[i] = vcvt_f32_f16(halves);
    }
    return joined<Floats>(quarters);
#else
    uint16_t halves[LANES];
    std::memcpy(halves, from, sizeof halves);
    Floats result;
    for (int i = 0; i < LANES; i++) result[i] = half_to_float(halves[i]);
    return result;
#endif
}

inline uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Lane i holds a pair of bfloat16: total[i] + pairs[i].low · pair.low + pairs[i].high · pair.high
inline Floats add_pair_products(Floats sums, Words pairs, uint32_t pair) {
#if defined(TABSTOP_AVX512) && defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(int(pair)));
#elif defined(TABSTOP_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    float32x4_t quarters[4];
    for (int i = 0; i < 4; i++)
        quarters[i] = vbfdotq_f32(quarter<float32x4_t>(sums, i), quarter<bfloat16x8_t>(pairs, i),
                                  vreinterpretq_bf16_u32(vdupq_n_u32(pair)));
    return joined<Floats>(quarters);
#else
    float low, high;
    uint32_t bits = pair << 16;
    std::memcpy(&low, &bits, 4);
    bits = pair & 0xffff0000;
    std::memcpy(&high, &bits, 4);
    sums = multiply_add((Floats)(pairs << 16), all(low), sums);
    return multiply_add((Floats)(pairs & 0xffff0000u), all(high), sums);
#endif
}

// ---- products of bytes

inline Bytes low_nibbles(Bytes bytes) { return bytes & (uint8_t)15; }

inline Bytes high_nibbles(Bytes bytes) {
#if defined(TABSTOP_AVX512)
    return (Bytes)_mm512_and_si512(_mm512_srli_epi16((__m512i)bytes, 4), _mm512_set1_epi8(15));
#else
    return bytes >> (uint8_t)4;
#endif
}

// Adds 16 to the bytes whose bit is set.
inline Bytes add_fifth_bits(Bytes bytes, const uint8_t* bits) {
    uint64_t mask;
    std::memcpy(&mask, bits, 8);
#if defined(TABSTOP_AVX512)
    return (Bytes)_mm512_mask_add_epi8((__m512i)bytes, mask, (__m512i)bytes, _mm512_set1_epi8(16));
#elif defined(TABSTOP_AVX2)
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                                            3, 3, 3, 3, 3, 3, 3);
    const __m256i each = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    Bytes result;
    for (int half = 0; half < 2; half++) {
        __m256i own = _mm256_shuffle_epi8(_mm256_set1_epi32(int(mask >> 32 * half)), spread), old;
        __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(own, each), each);
        std::memcpy(&old, (char*)&bytes + 32 * half, 32);
        old = _mm256_or_si256(old, _mm256_and_si256(set, _mm256_set1_epi8(16)));
        std::memcpy((char*)&result + 32 * half, &old, 32);
    }
    return result;
#elif defined(TABSTOP_NEON)
    const uint8x16_t spread = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint8x16_t each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8x16_t quarters[4];
    for (int i = 0; i < 4; i++) {
        uint8x16_t own = vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(uint16_t(mask >> 16 * i))), spread);
        uint8x16_t set = vandq_u8(vtstq_u8(own, each), vdupq_n_u8(16));
        quarters[i] = vorrq_u8(quarter<uint8x16_t>(bytes, i), set);
    }
    return joined<Bytes>(quarters);
#else
    for (int i = 0; i < 64; i++) bytes[i] |= uint8_t((mask >> i & 1) << 4);
    return bytes;
#endif
}

// sums[r] + Σ_t weights[4r + t] · x[t]. BITS: how large weights can be; of 8 bits, 128 is taken away from each on machines
// whose products saturate (has_signed_bytes), so that the caller must not.
#if defined(TABSTOP_AVX512) && defined(__AVX512VNNI__)
constexpr bool has_signed_bytes = false;
#else
constexpr bool has_signed_bytes = true;
#endif

template <int BITS> inline Ints add_products(Ints sums, Bytes weights, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
#if defined(TABSTOP_AVX512) && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(four));
#elif defined(TABSTOP_AVX512)
    __m512i w = (__m512i)weights, inputs = _mm512_set1_epi32(four);
    if (BITS == 8) {
        w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
        inputs = _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask(w), _mm512_setzero_si512(), inputs);
        w = _mm512_abs_epi8(w);
    }
    __m512i products = _mm512_madd_epi16(_mm512_maddubs_epi16(w, inputs), _mm512_set1_epi16(1));
    return sums + (Ints)products;
#elif defined(TABSTOP_AVX2)
    __m256i halves[2];
    std::memcpy(halves, &weights, 64);
    for (__m256i& half : halves) {
        __m256i inputs = _mm256_set1_epi32(four);
        if (BITS == 8) {
            half = _mm256_xor_si256(half, _mm256_set1_epi8(-128));
            inputs = _mm256_sign_epi8(inputs, half);
            half = _mm256_abs_epi8(half);
        }
        half = _mm256_madd_epi16(_mm256_maddubs_epi16(half, inputs), _mm256_set1_epi16(1));
    }
    Ints products;
    std::memcpy(&products, halves, 64);
    return sums + products;
#elif defined(TABSTOP_NEON)
    const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
    int32x4_t quarters[4];
    for (int i = 0; i < 4; i++) {
        uint8x16_t own = quarter<uint8x16_t>(weights, i);
        int8x16_t w = vreinterpretq_s8_u8(BITS == 8 ? veorq_u8(own, vdupq_n_u8(128)) : own);
        quarters[i] = quarter<int32x4_t>(sums, i);
#if defined(__ARM_FEATURE_DOTPROD)
        quarters[i] = vdotq_s32(quarters[i], w, inputs);
#else
        int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(inputs)), high = vmull_high_s8(w, inputs);
        quarters[i] = vaddq_s32(quarters[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    return joined<Ints>(quarters);
#else
    for (int r = 0; r < LANES; r++)
        for (int t = 0; t < 4; t++) sums[r] += (int32_t(weights[4 * r + t]) - (BITS == 8 ? 128 : 0)) * x[t];
    return sums;
#endif
}

inline void fetch_ahead(const void* place) { __builtin_prefetch(place, 0, 3); }

inline void relax() {
#if defined(TABSTOP_AVX512) || defined(TABSTOP_AVX2)
    _mm_pause();
#elif defined(TABSTOP_NEON)
    asm volatile("yield");
#endif
}

// ---- functions

// 2^x; below -126.5 it is 0, from 127.5 on the largest power.
inline Floats power_of_two(Floats x) {
    x = -larger(-larger(x, all(-127.0f)), all(-127.0f));
#if defined(TABSTOP_AVX512)
    Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 0);
#else
    Floats shift = all(12582912.0f);  // 1.5 · 2^23 pushes the fraction out
    Floats moved = x + shift;
    asm("" : "+m"(moved));
    Floats whole = moved - shift;
#endif
    Floats rest = x - whole;  // -0.5 to 0.5; a polynomial for 2^rest, 2e-7 exact
    Floats result = all(1.5353362e-4f);
    result = multiply_add(result, rest, all(1.3398874e-3f));
    result = multiply_add(result, rest, all(9.6184373e-3f));
    result = multiply_add(result, rest, all(5.5503324e-2f));
    result = multiply_add(result, rest, all(2.4022648e-1f));
    result = multiply_add(result, rest, all(6.9314720e-1f));
    result = multiply_add(result, rest, all(1.0f));
    Ints exponent = __builtin_convertvector(whole, Ints);
    Ints scale = (exponent + 127) << 23;  // 0 for -127: the result is 0
    return result * (Floats)scale;
}

constexpr float LOG2E = 1.44269504f;

inline Floats exponential(Floats x) { return power_of_two(x * LOG2E); }

}  // namespace tabstop
