// Rows times a panel of 16 outputs, summed over k in order: what every matrix product here is made of.
//
// A weight [O, K] is packed as O / 16 panels (zeros fill the last one). bfloat16: [K / 2][16][2], so that a 32-bit word
// holds two terms of one output, which are a shift and a mask away from floats, and what dot-product instructions and
// matrix tiles take. float32: [K][16]. Either way a panel is read once from start to end, a cache line at a time.
#pragma once
#include "simd.h"

namespace HEADRACE_ISA {

// Elements of a panel over K terms; K is even for bfloat16 (a term of zeros is added to odd ones).
INLINE int64_t padded_terms(int64_t K, int dtype) { return dtype == BFLOAT16 ? (K + 1) / 2 * 2 : K; }
INLINE int64_t panel_size(int64_t K, int dtype) { return padded_terms(K, dtype) * LANES; }

constexpr int PREFETCH_BYTES = 1024;

// Where the scales of panels are: of each panel a row, `lanes` of them (1 or LANES) for every so many `columns` terms.
struct Scales {
    const float *at;
    int64_t columns, lanes;
};

INLINE Scales of_panel(const Scales &scales, int64_t panel, int64_t K) {
    if (scales.at == nullptr) return scales;
    return {scales.at + panel * ((K + scales.columns - 1) / scales.columns) * scales.lanes, scales.columns, scales.lanes};
}

template <int ROWS>
INLINE void panel_product(const float *const *rows, const bf16 *panel, int64_t K, Lanes *sums) {
    Lanes sum[ROWS];
    UNROLL for (int i = 0; i < ROWS; i++) sum[i] = sums[i];
    for (int64_t k = 0; k < K; k += 2) {
        const bf16 *at = panel + k * LANES;
        __builtin_prefetch((const char *)at + PREFETCH_BYTES);
        vfloat even[PARTS], odd[PARTS];
        UNROLL for (int i = 0; i < PARTS; i++) {
            vuint pair = vector_at<vuint>(at + i * 2 * WIDTH);
            even[i] = as_float(pair << 16);
            odd[i] = as_float(pair & 0xffff0000);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            vfloat first = splat(rows[r][k]), second = splat(rows[r][k + 1]);
            UNROLL for (int i = 0; i < PARTS; i++) {
                sum[r].part[i] = sum[r].part[i] + first * even[i];
                sum[r].part[i] = sum[r].part[i] + second * odd[i];
            }
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) sums[i] = sum[i];
}

template <int ROWS>
INLINE void panel_product(const float *const *rows, const float *panel, int64_t K, Lanes *sums) {
    Lanes sum[ROWS];
    UNROLL for (int i = 0; i < ROWS; i++) sum[i] = sums[i];
    for (int64_t k = 0; k < K; k++) {
        const float *at = panel + k * LANES;
        __builtin_prefetch((const char *)at + PREFETCH_BYTES);
        vfloat weights[PARTS];
        UNROLL for (int i = 0; i < PARTS; i++) weights[i] = vector_at<vfloat>(at + i * WIDTH);
        UNROLL for (int r = 0; r < ROWS; r++) {
            vfloat term = splat(rows[r][k]);
            UNROLL for (int i = 0; i < PARTS; i++) sum[r].part[i] = sum[r].part[i] + term * weights[i];
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) sums[i] = sum[i];
}

// Add to `sums` [num_rows] the product of up to MAX_ROWS rows and a panel. Each row's sum is the same for any number.
template <class T>
static void few_rows(int num_rows, const float *const *rows, const T *panel, int64_t K, Lanes *sums) {
    switch (num_rows) {
        case 1: return panel_product<1>(rows, panel, K, sums);
        case 2: return panel_product<2>(rows, panel, K, sums);
        case 3: return panel_product<3>(rows, panel, K, sums);
        case 4: return panel_product<4>(rows, panel, K, sums);
        case 5: return panel_product<5>(rows, panel, K, sums);
        case 6: return panel_product<6>(rows, panel, K, sums);
#if MAX_ROWS_IS_12
        case 7: return panel_product<7>(rows, panel, K, sums);
        case 8: return panel_product<8>(rows, panel, K, sums);
        case 9: return panel_product<9>(rows, panel, K, sums);
        case 10: return panel_product<10>(rows, panel, K, sums);
        case 11: return panel_product<11>(rows, panel, K, sums);
        case 12: return panel_product<12>(rows, panel, K, sums);
#endif
    }
}

// Multiply any number of rows by a panel, block by block; `take(row, sum)` gets each row's 16 outputs.
template <class T, class Take>
INLINE void all_rows(int64_t num_rows, const float *const *rows, const T *panel, int64_t K, Take take) {
    int64_t num_blocks = (num_rows + MAX_ROWS - 1) / MAX_ROWS, first = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
        int count = (int)((num_rows - first + num_blocks - block - 1) / (num_blocks - block));
        Lanes sums[MAX_ROWS] = {};
        few_rows(count, rows + first, panel, K, sums);
        for (int i = 0; i < count; i++) take(first + i, sums[i]);
        first += count;
    }
}

}  // namespace HEADRACE_ISA
