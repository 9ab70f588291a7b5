// Causal attention of a chunk's queries over its context: keys and values go by in tiles, each made once for all queries.
//
// Tiles are counted from the sequence's first token, so a token's result does not depend on how its prompt was cut.
#pragma once
#include "panel.h"
#include "pool.h"
#include "rows.h"
#include "softmax.h"

namespace HEADRACE_ISA {

// What one thread works with, for up to `num_queries` queries (rows of any heads).
struct Workspace {
    float *queries, *sums, *greatest, *totals, *keys, *values, *rest;

    static size_t floats(int64_t num_queries, int64_t key_width, int64_t value_width, int64_t more) {
        int64_t padded = (value_width + LANES - 1) / LANES * LANES;
        return num_queries * (key_width + padded + 2) + TILE * (key_width + padded) + more + 128;
    }

    Workspace(float *memory, int64_t num_queries, int64_t key_width, int64_t value_width) {
        int64_t padded = (value_width + LANES - 1) / LANES * LANES;
        keys = memory;
        values = keys + TILE * key_width;
        rest = values + TILE * padded;
        queries = rest;
        sums = queries + num_queries * key_width;
        greatest = sums + num_queries * padded;
        totals = greatest + num_queries;
    }
};

// Put `count` rows [width] of keys into a tile's columns: [4][key_width][16], from its row `first` on.
template <class T>
INLINE void transpose_keys(const T *const *rows, int count, int64_t width, int64_t first, int64_t key_width, float *tile) {
    for (int key = 0; key < count; key++) {
        float *to = tile + key / LANES * key_width * LANES + first * LANES + key % LANES;
        for (int64_t d = 0; d < width; d++) to[d * LANES] = to_float(rows[key][d]);
    }
}

// Queries [num_queries * share, key_width] of `work`, `share` rows for each token, the last token at the last key.
// `fill(first, count)` makes the tile of keys first ...: work.keys [4][key_width][16], work.values [value panels][64][16].
template <class Fill>
INLINE void attend_causally(const Workspace &work, int64_t num_queries, int64_t share, int64_t num_keys,
                            int64_t key_width, int64_t value_width, float scale, Fill fill) {
    int64_t padded = (value_width + LANES - 1) / LANES * LANES, num_rows = num_queries * share;
    int64_t before = num_keys - num_queries;
    for (int64_t i = 0; i < num_rows; i++) work.greatest[i] = -INFINITY, work.totals[i] = 0.f;
    memset(work.sums, 0, num_rows * padded * sizeof(float));
    for (int64_t first = 0; first < num_keys; first += TILE) {
        int count = (int)(num_keys - first < TILE ? num_keys - first : TILE);
        fill(first, count);
        for (int64_t row = first > before ? (first - before) * share : 0; row < num_rows;) {
            int rows = (int)(num_rows - row < MAX_ROWS ? num_rows - row : MAX_ROWS), visible[MAX_ROWS];
            const float *query[MAX_ROWS], *weights[MAX_ROWS];
            float scores[MAX_ROWS * TILE], shrink[MAX_ROWS];
            for (int i = 0; i < rows; i++) {
                int64_t seen = before + (row + i) / share - first + 1;
                visible[i] = (int)(seen < count ? seen : count);
                query[i] = work.queries + (row + i) * key_width;
                weights[i] = scores + i * TILE;
            }
            for (int part = 0; part * LANES < visible[rows - 1]; part++) {
                Lanes sums[MAX_ROWS] = {};
                few_rows(rows, query, work.keys + part * key_width * LANES, key_width, sums);
                for (int i = 0; i < rows; i++) store(scores + i * TILE + part * LANES, sums[i]);
            }
            for (int i = 0; i < rows; i++)
                shrink[i] = soften(scores + i * TILE, visible[i], scale, work.greatest[row + i], work.totals[row + i]);
            for (int64_t d = 0; d < padded; d += LANES) {
                Lanes sums[MAX_ROWS];
                const float *values = work.values + d * TILE;
                for (int i = 0; i < rows; i++) sums[i] = load(work.sums + (row + i) * padded + d) * shrink[i];
                if (visible[0] == visible[rows - 1]) {
                    few_rows(rows, weights, values, visible[0], sums);
                } else {
                    // A token sees nothing of those behind it: 0 times what is not finite would not be 0.
                    for (int i = 0; i < rows; i++) few_rows(1, weights + i, values, visible[i], sums + i);
                }
                for (int i = 0; i < rows; i++) store(work.sums + (row + i) * padded + d, sums[i]);
            }
            row += rows;
        }
    }
    for (int64_t i = 0; i < num_rows; i++)
        for (int64_t d = 0; d < padded; d += LANES) {
            float *at = work.sums + i * padded + d;
            store(at, load(at) * (1.f / work.totals[i]));
        }
}

}  // namespace HEADRACE_ISA
