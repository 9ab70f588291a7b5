// Products of whole rows, where lanes are terms.
#pragma once
#include "simd.h"

namespace HEADRACE_ISA {

// scores[head] = query[head] . row: sixteen partial sums, added up in one order, whatever is computed beside them.
template <int HEADS, class T>
INLINE void scores_of(const float *query, int64_t query_stride, const T *row, int64_t width, float *scores,
                      int64_t score_stride) {
    Lanes sum[HEADS];
    UNROLL for (int h = 0; h < HEADS; h++) sum[h] = all(0.f);
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        Lanes at = load(row + d);
        UNROLL for (int h = 0; h < HEADS; h++)
            UNROLL for (int i = 0; i < PARTS; i++) {
                vfloat term = vector_at<vfloat>(query + h * query_stride + d + i * WIDTH);
                sum[h].part[i] = sum[h].part[i] + term * at.part[i];
            }
    }
    if (d < width) {
        Lanes at = load_some(row + d, (int)(width - d));
        UNROLL for (int h = 0; h < HEADS; h++)
            sum[h] = add_product(load_some(query + h * query_stride + d, (int)(width - d)), at, sum[h]);
    }
    UNROLL for (int h = 0; h < HEADS; h++) scores[h * score_stride] = add_up(sum[h]);
}

// products[i] = x . rows[i], for rows one behind another: the same sums as `scores_of`, for one `query`.
template <int ROWS, class T>
INLINE void products_of(const float *x, const T *rows, int64_t width, float *products) {
    Lanes sum[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) sum[r] = all(0.f);
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES)
        UNROLL for (int r = 0; r < ROWS; r++) {
            Lanes at = load(rows + r * width + d);
            UNROLL for (int i = 0; i < PARTS; i++) {
                vfloat term = vector_at<vfloat>(x + d + i * WIDTH);
                sum[r].part[i] = sum[r].part[i] + term * at.part[i];
            }
        }
    if (d < width) {
        Lanes term = load_some(x + d, (int)(width - d));
        UNROLL for (int r = 0; r < ROWS; r++)
            sum[r] = add_product(term, load_some(rows + r * width + d, (int)(width - d)), sum[r]);
    }
    UNROLL for (int r = 0; r < ROWS; r++) products[r] = add_up(sum[r]);
}

}  // namespace HEADRACE_ISA
