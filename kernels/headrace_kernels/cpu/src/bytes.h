// Products in 8 bits: a row of activations with one scale, a panel of weights with one scale an output.
//
// A weight [O, K] is packed as O / 16 panels [K / 4][16][4], so that a 32-bit word holds four terms of one output, what
// instructions for dot products of bytes take. A row of K terms lies as K bytes and zeros up to whole words, then its
// scale as a float. Sums are of whole numbers: the same in any order. Nothing reaches -128, so pairs of products, 2 *
// 127 * 127 at most, fit 16 bits.
#pragma once
#include "panel.h"

namespace HEADRACE_ISA {

constexpr int WORD = 4;

// Sixteen sums, two registers of eight: AVX-512 has no sign of its own, so it takes these as well.
struct WholeLanes {
#ifdef __AVX2__
    __m256i part[2];
#else
    int32_t of[LANES];
#endif
};

INLINE Lanes widened(const WholeLanes &sum) {
    int32_t whole[LANES];
    memcpy(whole, &sum, sizeof whole);
    Lanes out;
    UNROLL for (int i = 0; i < PARTS; i++) out.part[i] = __builtin_convertvector(vector_at<vint>(whole + i * WIDTH), vfloat);
    return out;
}

template <int ROWS>
INLINE void panel_product(const int8_t *const *rows, const int8_t *panel, int64_t K, WholeLanes *sums) {
    WholeLanes sum[ROWS] = {};
    for (int64_t k = 0; k < K; k += WORD) {
        const int8_t *at = panel + k * LANES;
        __builtin_prefetch((const char *)at + PREFETCH_BYTES);
#ifdef __AVX2__
        __m256i first = _mm256_loadu_si256((const __m256i *)at), second = _mm256_loadu_si256((const __m256i *)at + 1);
        __m256i ones = _mm256_set1_epi16(1);
        UNROLL for (int r = 0; r < ROWS; r++) {
            int32_t word;
            memcpy(&word, rows[r] + k, WORD);
            __m256i terms = _mm256_set1_epi32(word), size = _mm256_abs_epi8(terms);
            __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(first, terms));
            sum[r].part[0] = _mm256_add_epi32(sum[r].part[0], _mm256_madd_epi16(pairs, ones));
            pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(second, terms));
            sum[r].part[1] = _mm256_add_epi32(sum[r].part[1], _mm256_madd_epi16(pairs, ones));
        }
#else
        UNROLL for (int r = 0; r < ROWS; r++)
            for (int lane = 0; lane < LANES; lane++)
                for (int i = 0; i < WORD; i++) sum[r].of[lane] += rows[r][k + i] * at[lane * WORD + i];
#endif
    }
    UNROLL for (int r = 0; r < ROWS; r++) sums[r] = sum[r];
}

// The greatest magnitude of `x` * scale * weight; NaN if a term is not finite, so that no number is made of it.
template <class T>
INLINE float largest_term(const T *x, int64_t K, float scale, const T *weight) {
    Lanes most = all(0.f), bad = all(0.f);
    for (int64_t k = 0; k < K; k += LANES) {
        int count = (int)(K - k < LANES ? K - k : LANES);
        Lanes at = (count == LANES ? load(x + k) : load_some(x + k, count)) * scale;
        if (weight != nullptr) at = at * (count == LANES ? load(weight + k) : load_some(weight + k, count));
        UNROLL for (int i = 0; i < PARTS; i++) most.part[i] = greater(greater(at.part[i], -at.part[i]), most.part[i]);
        bad = bad + at * 0.f;
    }
    return greatest(most) + add_up(bad);
}

// `to` [padded bytes, a float] = `x` [K] * scale * weight [K] in steps of a 127th of the greatest; weight NULL: ones.
template <class T>
INLINE void quantise(const T *x, int64_t K, int64_t padded, float scale, const T *weight, int8_t *to) {
    // What is smaller than this is a row of zeros: its steps would be beyond a float.
    constexpr float SMALLEST = 1e-30f;
    float most = largest_term(x, K, scale, weight), row_scale = most < SMALLEST ? 0.f : most / 127.f;
    vfloat steps = splat(most > SMALLEST ? 127.f / most : 0.f), magic = splat(12582912.f);
    for (int64_t k = 0; k < padded; k += LANES) {
        int count = (int)(K - k < LANES ? K - k : LANES);
        Lanes at = (count == LANES ? load(x + k) : load_some(x + k, count)) * scale;
        if (weight != nullptr) at = at * (count == LANES ? load(weight + k) : load_some(weight + k, count));
        int32_t whole[LANES];
        UNROLL for (int i = 0; i < PARTS; i++) {
            vint rounded = __builtin_convertvector((at.part[i] * steps + magic) - magic, vint);
            memcpy(whole + i * WIDTH, &rounded, sizeof rounded);
        }
        int end = (int)(padded - k < LANES ? padded - k : LANES);
        for (int i = 0; i < end; i++) to[k + i] = (int8_t)whole[i];
    }
    memcpy(to + padded, &row_scale, sizeof row_scale);
}

}  // namespace HEADRACE_ISA
