// Latent attention of prompt chunks: each head expands the context's latents to keys and values, a tile at a time.
#include "prefill_attention.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t MOST_QUERIES = 2048;

struct MlaPrefill {
    const void *query;
    int64_t query_row_stride, query_head_stride, num_heads;
    const void *rows;
    int64_t row_stride, D, R;
    const void *w_uk, *w_uv;
    int64_t nope_dim, value_dim, num_sequences;
    const int32_t *query_starts, *key_starts;
    float scale;
    void *out;
};

// `weight` [O, K] as panels [O / 16][K][16] of floats, zeros past O.
template <class T>
void to_panels(const T *weight, int64_t O, int64_t K, float *panels) {
    for (int64_t panel = 0; panel * LANES < O; panel++)
        for (int64_t lane = 0; lane < LANES; lane++) {
            const T *from = weight + (panel * LANES + lane) * K;
            float *to = panels + panel * K * LANES + lane;
            bool is_there = panel * LANES + lane < O;
            for (int64_t k = 0; k < K; k++) to[k * LANES] = is_there ? to_float(from[k]) : 0.f;
        }
}

template <class T>
struct Head {
    const MlaPrefill &call;
    int64_t head, key_width, key_panels, value_panels;
    float *key_weights, *value_weights, *latents;

    static int64_t floats(const MlaPrefill &call) {
        int64_t panels = (call.nope_dim + LANES - 1) / LANES + (call.value_dim + LANES - 1) / LANES;
        return (panels * LANES + TILE) * call.D;
    }

    Head(const MlaPrefill &call, int64_t head, float *memory) : call(call), head(head) {
        key_width = call.nope_dim + call.R;
        key_panels = (call.nope_dim + LANES - 1) / LANES;
        value_panels = (call.value_dim + LANES - 1) / LANES;
        key_weights = memory;
        value_weights = key_weights + key_panels * LANES * call.D;
        latents = value_weights + value_panels * LANES * call.D;
        to_panels((const T *)call.w_uk + head * call.nope_dim * call.D, call.nope_dim, call.D, key_weights);
        to_panels((const T *)call.w_uv + head * call.value_dim * call.D, call.value_dim, call.D, value_weights);
    }

    // Expand rows [count, D + R] to a tile of keys and one of values.
    void expand(const T *rows, int count, float *keys, float *values) {
        int64_t D = call.D;
        const float *wide[TILE];
        const T *turned[TILE];
        for (int key = 0; key < count; key++) {
            const T *row = rows + key * call.row_stride;
            widen(row, D, D, 1.f, (const T *)nullptr, latents + key * D);
            wide[key] = latents + key * D;
            turned[key] = row + D;
        }
        transpose_keys(turned, count, call.R, call.nope_dim, key_width, keys);
        for (int64_t panel = 0; panel < key_panels; panel++) {
            int64_t first = panel * LANES, some = call.nope_dim - first < LANES ? call.nope_dim - first : LANES;
            all_rows(count, wide, key_weights + panel * D * LANES, D, [&](int64_t key, const Lanes &sum) {
                float at[LANES], *to = keys + (key / LANES * key_width + first) * LANES + key % LANES;
                store(at, sum);
                for (int64_t i = 0; i < some; i++) to[i * LANES] = at[i];
            });
        }
        for (int64_t panel = 0; panel < value_panels; panel++)
            all_rows(count, wide, value_weights + panel * D * LANES, D, [&](int64_t key, const Lanes &sum) {
                store(values + (panel * TILE + key) * LANES, sum);
            });
    }
};

template <class T>
void mla_prefill(const MlaPrefill &call) {
    int64_t key_width = call.nope_dim + call.R, longest = 0;
    for (int64_t b = 0; b < call.num_sequences; b++) {
        int64_t count = call.query_starts[b + 1] - call.query_starts[b];
        longest = count > longest ? count : longest;
    }
    longest = longest < MOST_QUERIES ? longest : MOST_QUERIES;
    size_t own = Workspace::floats(longest, key_width, call.value_dim, 0) + Head<T>::floats(call);
    own = (own + LANES - 1) / LANES * LANES;
    float *memory = headrace::scratch_of<float>(0, own * headrace::num_threads());
    headrace::stage(call.num_sequences * call.num_heads, [&](int64_t task, int thread) {
        int64_t b = task / call.num_heads, h = task % call.num_heads;
        Head<T> head(call, h, memory + thread * own);
        Workspace work(memory + thread * own + Head<T>::floats(call), longest, key_width, call.value_dim);
        int64_t padded = (call.value_dim + LANES - 1) / LANES * LANES;
        int64_t q0 = call.query_starts[b], q1 = call.query_starts[b + 1];
        int64_t k0 = call.key_starts[b], k1 = call.key_starts[b + 1];
        for (int64_t first = q0; first < q1; first += MOST_QUERIES) {
            int64_t count = q1 - first < MOST_QUERIES ? q1 - first : MOST_QUERIES, keys = k1 - k0 - (q1 - first - count);
            for (int64_t i = 0; i < count; i++)
                widen((const T *)call.query + (first + i) * call.query_row_stride + h * call.query_head_stride, key_width,
                      key_width, 1.f, (const T *)nullptr, work.queries + i * key_width);
            attend_causally(work, count, 1, keys, key_width, call.value_dim, call.scale, [&](int64_t key, int some) {
                head.expand((const T *)call.rows + (k0 + key) * call.row_stride, some, work.keys, work.values);
            });
            for (int64_t i = 0; i < count; i++)
                narrow(work.sums + i * padded, call.value_dim,
                       (T *)call.out + ((first + i) * call.num_heads + h) * call.value_dim);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/mla_prefill.py. 0: done; 1: no memory.
EXPORT int ENTRY(mla_prefill)(const MlaPrefill *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? mla_prefill<bf16>(*call) : mla_prefill<float>(*call); });
}
