// How the weights of a product are held, and the rows that they meet: as numbers, as whole numbers, in blocks of FP8.
#pragma once
#include "bytes.h"
#include "fp8.h"
#include "panel.h"
#include "rows.h"

namespace HEADRACE_ISA {

// Panels of float32 or bfloat16; a row is floats.
template <class T>
struct WideWeights {
    using Weight = T;
    using Term = float;
    static constexpr bool ROWS_ARE_FLOATS = true;

    static int64_t terms(int64_t K) { return padded_terms(K, sizeof(T) == 2 ? BFLOAT16 : FLOAT32); }
    static int64_t row_size(int64_t K) { return terms(K); }

    template <class X>
    INLINE void prepare(const X *x, int64_t K, float scale, const X *norm_weight, float *to) {
        widen(x, K, terms(K), scale, norm_weight, to);
    }

    // `take(row, sum)` gets each row's 16 outputs.
    template <class Take>
    INLINE void multiply(int64_t num_rows, const float *const *rows, const T *panel, const Scales &, int64_t K, Take take) {
        all_rows(num_rows, rows, panel, terms(K), take);
    }
};

// Panels in blocks of FP8; a row is floats.
struct Fp8Weights {
    using Weight = uint8_t;
    using Term = float;
    static constexpr bool ROWS_ARE_FLOATS = true;

    static int64_t terms(int64_t K) { return K; }
    static int64_t row_size(int64_t K) { return K; }

    template <class X>
    INLINE void prepare(const X *x, int64_t K, float scale, const X *norm_weight, float *to) {
        widen(x, K, K, scale, norm_weight, to);
    }

    template <class Take>
    INLINE void multiply(int64_t num_rows, const float *const *rows, const uint8_t *panel, const Scales &scales, int64_t K,
                         Take take) {
        all_fp8_rows(num_rows, rows, panel, scales, K, take);
    }
};

// Panels in 8 bits; a row is bytes and its scale.
struct ByteWeights {
    using Weight = int8_t;
    using Term = int8_t;
    static constexpr bool ROWS_ARE_FLOATS = false;
    static constexpr int MOST = 4;

    static int64_t terms(int64_t K) { return (K + WORD - 1) / WORD * WORD; }
    static int64_t row_size(int64_t K) { return terms(K) + (int64_t)sizeof(float); }

    template <class X>
    INLINE void prepare(const X *x, int64_t K, float scale, const X *norm_weight, int8_t *to) {
        quantise(x, K, terms(K), scale, norm_weight, to);
    }

    // `scales`: those of the panel's outputs, of all terms.
    template <class Take>
    INLINE void multiply(int64_t num_rows, const int8_t *const *rows, const int8_t *panel, const Scales &scales, int64_t K,
                         Take take) {
        int64_t padded = terms(K), num_blocks = (num_rows + MOST - 1) / MOST, first = 0;
        Lanes outputs = load(scales.at);
        for (int64_t block = 0; block < num_blocks; block++) {
            int count = (int)((num_rows - first + num_blocks - block - 1) / (num_blocks - block));
            WholeLanes sums[MOST] = {};
            switch (count) {
                case 1: panel_product<1>(rows + first, panel, padded, sums); break;
                case 2: panel_product<2>(rows + first, panel, padded, sums); break;
                case 3: panel_product<3>(rows + first, panel, padded, sums); break;
                case 4: panel_product<4>(rows + first, panel, padded, sums); break;
            }
            for (int i = 0; i < count; i++) {
                float scale;
                memcpy(&scale, rows[first + i] + padded, sizeof scale);
                take(first + i, widened(sums[i]) * outputs * scale);
            }
            first += count;
        }
    }
};

}  // namespace HEADRACE_ISA
