// A token's latent: normalised, rotated, and stored; NaN throughout, each of the two, if it is not finite.
#pragma once
#include "rows.h"

namespace HEADRACE_ISA {

struct LatentRows {
    const void *c_kv;
    int64_t c_kv_stride;
    const void *k_pe;
    int64_t k_pe_stride, num_rows, D, R;
    const void *norm_weight;
    const float *cos, *sin;
    int64_t is_interleaved;
    float eps;
    void *cache;
    int64_t cache_stride;
    const int64_t *slots;
};

// Rotate `x` [R] by its position's angles to `to` [R], its pairs' firsts, then their seconds.
template <class T>
INLINE void turn(const T *x, int64_t R, const float *cos, const float *sin, bool is_interleaved, float *to) {
    int64_t half = R / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = to_float(is_interleaved ? x[2 * i] : x[i]);
        float second = to_float(is_interleaved ? x[2 * i + 1] : x[half + i]);
        to[i] = first * cos[i] - second * sin[i];
        to[half + i] = second * cos[i] + first * sin[i];
    }
}

// Write row `row` to its slot, if it has one; `scratch` [D + R].
template <class T>
INLINE void store_latent(const LatentRows &rows, int64_t row, float *scratch) {
    int64_t slot = rows.slots[row];
    if (slot < 0) return;
    const T *c_kv = (const T *)rows.c_kv + row * rows.c_kv_stride, *k_pe = (const T *)rows.k_pe + row * rows.k_pe_stride;
    widen(c_kv, rows.D, rows.D, norm_scale(c_kv, rows.D, rows.eps), (const T *)rows.norm_weight, scratch);
    float *turned = scratch + rows.D, spoilt = 0.f;
    turn(k_pe, rows.R, rows.cos + row * (rows.R / 2), rows.sin + row * (rows.R / 2), rows.is_interleaved, turned);
    for (int64_t i = 0; i < rows.R; i++) spoilt += turned[i] * 0.f;
    if (spoilt != 0.f)
        for (int64_t i = 0; i < rows.R; i++) turned[i] = NAN;
    T *to = (T *)rows.cache + slot * rows.cache_stride;
    narrow(scratch, rows.D, to);
    narrow(turned, rows.R, to + rows.D);
}

}  // namespace HEADRACE_ISA
