// Products with weights in blocks of FP8: bytes of float8_e4m3fn, and a scale for each block of rows and columns.
//
// A weight [O, K] is packed as O / 16 panels [K][16] bytes. The terms of a block's columns are summed by themselves,
// then scaled: what is multiplied is the number that a byte stands for, in float32, whatever activations are.
#pragma once
#include "panel.h"

namespace HEADRACE_ISA {

// Terms that are summed before they are scaled; so many rows of a panel as floats fit the first-level cache.
constexpr int64_t MOST_TERMS = 128;
// Rows that a panel's numbers are made floats for at once.
constexpr int64_t FP8_ROWS = 48;
// A half's exponent is 8 less than that of the byte it is made of.
constexpr float OF_HALVES = 256.f;

// The numbers of 16 bytes, divided by OF_HALVES: as halves, they have the same exponent and more zeros behind it.
INLINE Lanes load_fp8(const uint8_t *from) {
    Lanes out;
#if HEADRACE_WIDTH == 8 && defined(__F16C__)
    __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from)), 8);
    __m256i halves = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xbfff));
    out.part[0] = (vfloat)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    out.part[1] = (vfloat)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#elif HEADRACE_WIDTH == 16 && defined(__AVX512F__)
    __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from)), 8);
    __m256i halves = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xbfff));
    out.part[0] = (vfloat)_mm512_cvtph_ps(halves);
#else
    typedef uint8_t vbyte __attribute__((vector_size(WIDTH)));
    UNROLL for (int i = 0; i < PARTS; i++) {
        vuint bits = __builtin_convertvector(vector_at<vbyte>(from + i * WIDTH), vuint);
        vuint size = bits & 0x7f;
        vfloat normal = as_float((size << 20) + (112u << 23));
        vfloat subnormal = as_float((size << 20) + (113u << 23)) - as_float(vuint{} + (113u << 23));
        vuint is_subnormal = (vuint)(size < 8);
        vuint value = ((vuint)subnormal & is_subnormal) | ((vuint)normal & ~is_subnormal);
        out.part[i] = as_float(value | (bits & 0x80) << 24);
    }
#endif
    return out;
}

INLINE Lanes scale_at(const Scales &scales, int64_t k) {
    const float *at = scales.at + k / scales.columns * scales.lanes;
    return (scales.lanes == 1 ? all(*at) : load(at)) * OF_HALVES;
}

// Where the terms end that are summed together with term `k`.
INLINE int64_t terms_end(int64_t k, int64_t K, int64_t columns) {
    int64_t end = (k / columns + 1) * columns;
    end = end < k + MOST_TERMS ? end : k + MOST_TERMS;
    return end < K ? end : K;
}

template <int ROWS>
INLINE void fp8_product(const float *const *rows, const uint8_t *panel, const Scales &scales, int64_t K, Lanes *sums) {
    for (int64_t k = 0; k < K;) {
        int64_t first = k, end = terms_end(k, K, scales.columns);
        Lanes sum[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) sum[r] = all(0.f);
        for (; k < end; k++) {
            const uint8_t *at = panel + k * LANES;
            __builtin_prefetch((const char *)at + PREFETCH_BYTES);
            Lanes weights = load_fp8(at);
            UNROLL for (int r = 0; r < ROWS; r++) {
                vfloat term = splat(rows[r][k]);
                UNROLL for (int i = 0; i < PARTS; i++) sum[r].part[i] = sum[r].part[i] + term * weights.part[i];
            }
        }
        Lanes scale = scale_at(scales, first);
        UNROLL for (int r = 0; r < ROWS; r++) sums[r] = add_product(sum[r], scale, sums[r]);
    }
}

// Add to `sums` [num_rows] the product of up to MAX_ROWS rows and a panel. Each row's sum is the same for any number.
static void few_fp8_rows(int num_rows, const float *const *rows, const uint8_t *panel, const Scales &scales, int64_t K,
                         Lanes *sums) {
    switch (num_rows) {
        case 1: return fp8_product<1>(rows, panel, scales, K, sums);
        case 2: return fp8_product<2>(rows, panel, scales, K, sums);
        case 3: return fp8_product<3>(rows, panel, scales, K, sums);
        case 4: return fp8_product<4>(rows, panel, scales, K, sums);
        case 5: return fp8_product<5>(rows, panel, scales, K, sums);
        case 6: return fp8_product<6>(rows, panel, scales, K, sums);
#if MAX_ROWS_IS_12
        case 7: return fp8_product<7>(rows, panel, scales, K, sums);
        case 8: return fp8_product<8>(rows, panel, scales, K, sums);
        case 9: return fp8_product<9>(rows, panel, scales, K, sums);
        case 10: return fp8_product<10>(rows, panel, scales, K, sums);
        case 11: return fp8_product<11>(rows, panel, scales, K, sums);
        case 12: return fp8_product<12>(rows, panel, scales, K, sums);
#endif
    }
}

// The same for any number up to FP8_ROWS: a block's numbers are made floats once for all of them.
static void many_fp8_rows(int64_t num_rows, const float *const *rows, const uint8_t *panel, const Scales &scales,
                          int64_t K, Lanes *sums) {
    alignas(64) float floats[MOST_TERMS * LANES];
    const float *at[FP8_ROWS];
    for (int64_t k = 0; k < K;) {
        int64_t first = k, end = terms_end(k, K, scales.columns);
        for (; k < end; k++) store(floats + (k - first) * LANES, load_fp8(panel + k * LANES));
        for (int64_t r = 0; r < num_rows; r++) at[r] = rows[r] + first;
        Lanes scale = scale_at(scales, first);
        all_rows(num_rows, at, floats, end - first,
                 [&](int64_t row, const Lanes &sum) { sums[row] = add_product(sum, scale, sums[row]); });
    }
}

// Multiply any number of rows by a panel; `take(row, sum)` gets each row's 16 outputs.
template <class Take>
INLINE void all_fp8_rows(int64_t num_rows, const float *const *rows, const uint8_t *panel, const Scales &scales,
                         int64_t K, Take take) {
    for (int64_t first = 0; first < num_rows; first += FP8_ROWS) {
        int64_t count = num_rows - first < FP8_ROWS ? num_rows - first : FP8_ROWS;
        Lanes sums[FP8_ROWS];
        for (int64_t i = 0; i < count; i++) sums[i] = all(0.f);
        if (count <= MAX_ROWS) {
            few_fp8_rows((int)count, rows + first, panel, scales, K, sums);
        } else {
            many_fp8_rows(count, rows + first, panel, scales, K, sums);
        }
        for (int64_t i = 0; i < count; i++) take(first + i, sums[i]);
    }
}

}  // namespace HEADRACE_ISA
