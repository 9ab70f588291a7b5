// Rows of activations as floats, normalised or as they are.
#pragma once
#include "simd.h"

namespace HEADRACE_ISA {

// 1 / sqrt(mean(x^2) + eps); NaN where that is infinite, so that numbers too large to be squared do not become zeros.
template <class T>
INLINE float norm_scale(const T *x, int64_t K, float eps) {
    Lanes squares = all(0.f);
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        Lanes at = load(x + k);
        squares = add_product(at, at, squares);
    }
    if (k < K) {
        Lanes at = load_some(x + k, (int)(K - k));
        squares = add_product(at, at, squares);
    }
    float mean = add_up(squares) / (float)K + eps;
    return 1.f / sqrtf(mean) - mean * 0.f;
}

// `to` [padded K] = x [K] * scale * weight [K]; weight NULL: ones. What pads K is 0.
template <class T>
INLINE void widen(const T *x, int64_t K, int64_t padded, float scale, const T *weight, float *to) {
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        Lanes at = load(x + k) * scale;
        store(to + k, weight == nullptr ? at : at * load(weight + k));
    }
    for (; k < K; k++) to[k] = to_float(x[k]) * scale * (weight == nullptr ? 1.f : to_float(weight[k]));
    for (; k < padded; k++) to[k] = 0.f;
}

INLINE void from_float(float *to, float x) { *to = x; }
INLINE void from_float(bf16 *to, float x) { store_some(to, all(x), 1); }

template <class T>
INLINE void narrow(const float *x, int64_t K, T *to) {
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) store(to + k, load(x + k));
    if (k < K) store_some(to + k, load_some(x + k, (int)(K - k)), (int)(K - k));
}

}  // namespace HEADRACE_ISA
