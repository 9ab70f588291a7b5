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

}  // namespace HEADRACE_ISA
