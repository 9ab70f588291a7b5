// Sixteen floats at a time, whatever the machine: two vectors of eight, or one of sixteen.
//
// One source for every instruction set: build.py compiles each family once per set, and the compiler's vector types
// become its registers. A sum over k has one order, k = 0, 1, 2 ..., in every build, because lanes are outputs, never
// terms; where lanes are terms (a norm, a score) there are always sixteen of them, added up in one order.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef HEADRACE_ISA
#error "build.py names the instruction set: -DHEADRACE_ISA=avx2"
#endif
#define HEADRACE_JOIN2(name, isa) headrace_##name##_##isa
#define HEADRACE_JOIN(name, isa) HEADRACE_JOIN2(name, isa)
// The C name of an entry in this build.
#define ENTRY(name) HEADRACE_JOIN(name, HEADRACE_ISA)
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace HEADRACE_ISA {

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#define SHUFFLED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLED(x, ...) __builtin_shuffle(x, vint{__VA_ARGS__})
#endif

constexpr int LANES = 16;
// Tests force a width of 16 where there are no such registers: the compiler makes two of each vector.
#ifndef HEADRACE_WIDTH
#ifdef __AVX512F__
#define HEADRACE_WIDTH 16
#else
#define HEADRACE_WIDTH 8
#endif
#endif
#if HEADRACE_WIDTH == 16
constexpr int MAX_ROWS = 12;  // of a block: their sums fill the registers
#define MAX_ROWS_IS_12 1
#else
constexpr int MAX_ROWS = 6;
#define MAX_ROWS_IS_12 0
#endif
constexpr int WIDTH = HEADRACE_WIDTH;
constexpr int PARTS = LANES / WIDTH;

typedef float vfloat __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t vuint __attribute__((vector_size(WIDTH * 4)));
typedef int32_t vint __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t vshort __attribute__((vector_size(WIDTH * 2)));

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };
typedef uint16_t bf16;

struct Lanes {
    vfloat part[PARTS];
};

INLINE vfloat splat(float x) { return x - vfloat{}; }
INLINE vfloat as_float(vuint x) { return (vfloat)x; }

INLINE Lanes all(float x) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = splat(x);
    return out;
}

// Whole vectors: a copy of all lanes at once would go by the stack, in smaller pieces.
template <class V, class T>
INLINE V vector_at(const T *from) {
    V out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE Lanes load(const float *from) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = vector_at<vfloat>(from + i * WIDTH);
    return out;
}

// Written out where compilers take five instructions for one.
INLINE vuint widened(const bf16 *from) {
#if HEADRACE_WIDTH == 8 && defined(__AVX2__)
    return (vuint)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#elif HEADRACE_WIDTH == 16 && defined(__AVX512F__)
    return (vuint)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#else
    return __builtin_convertvector(vector_at<vshort>(from), vuint);
#endif
}

INLINE Lanes load(const bf16 *from) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = as_float(widened(from + i * WIDTH) << 16);
    return out;
}

INLINE void store(float *to, const Lanes &x) {
    UNROLL for (int i = 0; i < PARTS; i++) memcpy(to + i * WIDTH, &x.part[i], sizeof x.part[i]);
}

// To the nearest, ties to even; what is not a number stays so.
INLINE void store(bf16 *to, const Lanes &x) {
    UNROLL for (int i = 0; i < PARTS; i++) {
        vuint bits = (vuint)x.part[i];
        vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        vuint is_nan = (vuint)(x.part[i] != x.part[i]);
        vshort raw = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), vshort);
        memcpy(to + i * WIDTH, &raw, sizeof raw);
    }
}

// `x` rounded to the dtype that the pointer is of, and wide again.
INLINE Lanes rounded(const float *, const Lanes &x) { return x; }
INLINE Lanes rounded(const bf16 *, const Lanes &x) {
    bf16 narrow[LANES];
    store(narrow, x);
    return load(narrow);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

template <class T>
INLINE Lanes load_some(const T *from, int count) {
    T padded[LANES] = {};
    memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
INLINE void store_some(T *to, const Lanes &x, int count) {
    T padded[LANES];
    store(padded, x);
    memcpy(to, padded, count * sizeof(T));
}

INLINE Lanes operator+(const Lanes &a, const Lanes &b) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = a.part[i] + b.part[i];
    return out;
}

INLINE Lanes operator*(const Lanes &a, const Lanes &b) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = a.part[i] * b.part[i];
    return out;
}

INLINE Lanes operator*(const Lanes &a, float b) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = a.part[i] * b;
    return out;
}

// sum + a * b, rounded once where the machine can.
INLINE Lanes add_product(const Lanes &a, const Lanes &b, const Lanes &sum) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = sum.part[i] + a.part[i] * b.part[i];
    return out;
}

INLINE float add_up(const Lanes &x) {
#if HEADRACE_WIDTH == 16
    vfloat sum = x.part[0];
    sum = sum + SHUFFLED(sum, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sum = sum + SHUFFLED(sum, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15);
    sum = sum + SHUFFLED(sum, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    vfloat sum = x.part[0] + x.part[1];
    sum = sum + SHUFFLED(sum, 4, 5, 6, 7, 0, 1, 2, 3);
    sum = sum + SHUFFLED(sum, 2, 3, 0, 1, 4, 5, 6, 7);
#endif
    return sum[0] + sum[1];
}

INLINE vfloat greater(vfloat a, vfloat b) { return a > b ? a : b; }

// Of those that are numbers; -infinity if none is.
INLINE float greatest(const Lanes &x) {
    vfloat out = splat(-INFINITY);
    UNROLL for (int i = 0; i < PARTS; i++) out = greater(x.part[i], out);
#if HEADRACE_WIDTH == 16
    out = greater(SHUFFLED(out, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), out);
    out = greater(SHUFFLED(out, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15), out);
    out = greater(SHUFFLED(out, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), out);
#else
    out = greater(SHUFFLED(out, 4, 5, 6, 7, 0, 1, 2, 3), out);
    out = greater(SHUFFLED(out, 2, 3, 0, 1, 4, 5, 6, 7), out);
#endif
    return out[1] > out[0] ? out[1] : out[0];
}

// e^x within 2 units in the last place; 0 below -87, NaN for NaN.
INLINE vfloat exponential(vfloat x) {
    vfloat top = splat(88.f), bottom = splat(-87.f);
    vuint is_zero = (vuint)(x < bottom);
    x = x > top ? top : x;
    x = x < bottom ? bottom : x;
    vfloat magic = splat(12582912.f);
    vfloat n = (x * 1.44269504f + magic) - magic;
    vfloat r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    vint exponent = (__builtin_convertvector(n, vint) + 127) << 23;
    return as_float((vuint)(p * (vfloat)exponent) & ~is_zero);
}

INLINE Lanes exponential(const Lanes &x) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = exponential(x.part[i]);
    return out;
}

// gate / (1 + e^-gate) * up
INLINE Lanes silu_times(const Lanes &gate, const Lanes &up) {
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++)
        out.part[i] = gate.part[i] / (1.f + exponential(-gate.part[i])) * up.part[i];
    return out;
}

}  // namespace HEADRACE_ISA
