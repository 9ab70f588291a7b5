// Absorbed latent attention of decode rows, and each head's latents times its W_UV.
#include "decode_attention.h"
#include "pool.h"
#include "rows.h"

namespace HEADRACE_ISA {
namespace {

struct MlaDecode {
    const void *query;
    int64_t query_row_stride, query_head_stride, num_rows, num_heads;
    const void *cache;
    int64_t page_size;
    const int32_t *block_table;
    int64_t table_stride;
    const int32_t *context_lens;
    int64_t D, R;
    float scale;
    // NULL: `out` is the latents [B, H, D]; else [H, Dv, D], and `out` is the values [B, H * Dv].
    const void *w_uv;
    int64_t value_dim;
    void *out;
};

// values[row] = latents[row] . weight, lanes being terms; three rows of one head at a time, or four outputs of one row.
template <class T>
void multiply(const float *latents, int64_t stride, int64_t num_rows, const T *weight, int64_t D, int64_t count, T *out,
              int64_t out_stride) {
    int64_t v = 0;
    for (; num_rows < 3 && v + 4 <= count; v += 4)
        for (int64_t row = 0; row < num_rows; row++) {
            float sums[4];
            products_of<4>(latents + row * stride, weight + v * D, D, sums);
            for (int i = 0; i < 4; i++) from_float(out + row * out_stride + v + i, sums[i]);
        }
    for (; v < count; v++) {
        const T *at = weight + v * D;
        int64_t row = 0;
        for (; row + 3 <= num_rows; row += 3) {
            float sums[3];
            scores_of<3>(latents + row * stride, stride, at, D, sums, 1);
            for (int i = 0; i < 3; i++) from_float(out + (row + i) * out_stride + v, sums[i]);
        }
        for (; row < num_rows; row++) {
            float sum;
            scores_of<1>(latents + row * stride, stride, at, D, &sum, 1);
            from_float(out + row * out_stride + v, sum);
        }
    }
}

template <class T>
void mla_decode(const MlaDecode &call) {
    int64_t width = call.D + call.R, out_width = (call.D + LANES - 1) / LANES * LANES;
    int64_t num_groups = (call.num_heads + MAX_HEADS - 1) / MAX_HEADS, most = MAX_HEADS;
    float *queries = headrace::scratch_of<float>(0, headrace::num_threads() * most * width);
    float *latents = headrace::scratch_of<float>(1, call.num_rows * call.num_heads * out_width);
    headrace::stage(call.num_rows * num_groups, [&](int64_t task, int thread) {
        int64_t row = task / num_groups, group = task % num_groups;
        int64_t first = call.num_heads * group / num_groups, end = call.num_heads * (group + 1) / num_groups;
        float *query = queries + thread * most * width;
        for (int64_t h = first; h < end; h++)
            widen((const T *)call.query + row * call.query_row_stride + h * call.query_head_stride, width, width, 1.f,
                  (const T *)nullptr, query + (h - first) * width);
        const int32_t *pages = call.block_table + row * call.table_stride;
        auto find = [&](int64_t start, int count, const T **keys, const T **values) {
            for (int i = 0; i < count; i++) {
                int64_t at = start + i;
                int64_t slot = (int64_t)pages[at / call.page_size] * call.page_size + at % call.page_size;
                keys[i] = values[i] = (const T *)call.cache + slot * width;
            }
        };
        float *out = latents + (row * call.num_heads + first) * out_width;
        attend<T>((int)(end - first), query, width, width, call.D, call.context_lens[row], call.scale, find, out,
                  out_width);
        if (call.w_uv == nullptr)
            for (int64_t h = first; h < end; h++)
                narrow(latents + (row * call.num_heads + h) * out_width, call.D,
                       (T *)call.out + (row * call.num_heads + h) * call.D);
    });
    if (call.w_uv == nullptr) return;
    int64_t pieces = (call.value_dim + 31) / 32;
    headrace::stage(call.num_heads * pieces, [&](int64_t task, int) {
        int64_t head = task / pieces, first = task % pieces * 32;
        int64_t count = call.value_dim - first < 32 ? call.value_dim - first : 32;
        int64_t column = head * call.value_dim + first, out_stride = call.num_heads * call.value_dim;
        multiply(latents + head * out_width, call.num_heads * out_width, call.num_rows,
                 (const T *)call.w_uv + column * call.D, call.D, count, (T *)call.out + column, out_stride);
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/mla_decode.py. 0: done; 1: no memory.
EXPORT int ENTRY(mla_decode)(const MlaDecode *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? mla_decode<bf16>(*call) : mla_decode<float>(*call); });
}
