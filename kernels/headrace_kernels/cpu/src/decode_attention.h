// Attention of single queries over rows that lie in pages, read where they are.
//
// Keys go by in tiles of 64, counted from a sequence's first token whatever its pages, with a running maximum and sum:
// a head's result depends on its query and its context alone.
#pragma once
#include "products.h"
#include "softmax.h"

namespace HEADRACE_ISA {

constexpr int MAX_HEADS = 6;
// Rows come from memory while those before them are computed with.
constexpr int KEYS_AHEAD = 4;

// out[head][d ... d + 16] = out * shrink[head] + sum over keys of weights[head][key] * row[key][d ... d + 16]
template <int HEADS, class T>
INLINE void add_values(const float *weights, const float *shrink, const T *const *rows, int count, int64_t d, int some,
                       float *out, int64_t out_stride) {
    Lanes sum[HEADS];
    UNROLL for (int h = 0; h < HEADS; h++) sum[h] = load(out + h * out_stride + d) * shrink[h];
    for (int key = 0; key < count; key++) {
        Lanes at = some == LANES ? load(rows[key] + d) : load_some(rows[key] + d, some);
        UNROLL for (int h = 0; h < HEADS; h++) {
            vfloat weight = splat(weights[h * TILE + key]);
            UNROLL for (int i = 0; i < PARTS; i++) sum[h].part[i] = sum[h].part[i] + weight * at.part[i];
        }
    }
    UNROLL for (int h = 0; h < HEADS; h++) store(out + h * out_stride + d, sum[h]);
}

// `out` [HEADS, out_stride] = softmax(query . keys * scale) @ values. `find(first, count, keys, values)` says where the
// rows of tokens first ... first + count lie. `out_stride` is a multiple of 16 not below `value_width`.
template <int HEADS, class T, class Find>
INLINE void attend_heads(const float *query, int64_t query_stride, int64_t key_width, int64_t value_width,
                         int64_t num_keys, float scale, Find find, float *out, int64_t out_stride) {
    float scores[HEADS * TILE], greatest_yet[HEADS], total[HEADS], shrink[HEADS];
    const T *keys[TILE], *values[TILE];
    UNROLL for (int h = 0; h < HEADS; h++) {
        greatest_yet[h] = -INFINITY;
        total[h] = 0.f;
        for (int64_t d = 0; d < value_width; d += LANES) store(out + h * out_stride + d, all(0.f));
    }
    for (int64_t first = 0; first < num_keys; first += TILE) {
        int count = (int)(num_keys - first < TILE ? num_keys - first : TILE);
        find(first, count, keys, values);
        for (int key = 0; key < count; key++) {
            if (key + KEYS_AHEAD < count)
                for (int64_t d = 0; d < key_width; d += 64 / sizeof(T))
                    __builtin_prefetch(keys[key + KEYS_AHEAD] + d);
            scores_of<HEADS>(query, query_stride, keys[key], key_width, scores + key, TILE);
        }
        for (int h = 0; h < HEADS; h++) shrink[h] = soften(scores + h * TILE, count, scale, greatest_yet[h], total[h]);
        for (int64_t d = 0; d < value_width; d += LANES) {
            int some = (int)(value_width - d < LANES ? value_width - d : LANES);
            add_values<HEADS>(scores, shrink, values, count, d, some, out, out_stride);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int64_t d = 0; d < value_width; d += LANES) {
            float *at = out + h * out_stride + d;
            store(at, load(at) * (1.f / total[h]));
        }
}

template <class T, class Find>
static void attend(int num_heads, const float *query, int64_t query_stride, int64_t key_width, int64_t value_width,
                   int64_t num_keys, float scale, Find find, float *out, int64_t out_stride) {
#define CASE(n)                                                                                                      \
    case n:                                                                                                          \
        return attend_heads<n, T>(query, query_stride, key_width, value_width, num_keys, scale, find, out, out_stride)
    switch (num_heads) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
    }
#undef CASE
}

}  // namespace HEADRACE_ISA
