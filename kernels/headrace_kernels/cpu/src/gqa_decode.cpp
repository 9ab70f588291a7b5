// Grouped-query attention of decode rows over pages that hold their tokens' keys, then their values.
#include "decode_attention.h"
#include "pool.h"
#include "rows.h"

namespace HEADRACE_ISA {
namespace {

struct GqaDecode {
    const void *query;
    int64_t query_row_stride, query_head_stride, num_rows, num_heads;
    const void *cache;
    int64_t page_size, num_groups;
    const int32_t *block_table;
    int64_t table_stride;
    const int32_t *context_lens;
    int64_t D;
    float scale;
    void *out;
};

template <class T>
void gqa_decode(const GqaDecode &call) {
    int64_t D = call.D, out_width = (D + LANES - 1) / LANES * LANES, share = call.num_heads / call.num_groups;
    int64_t pieces = (share + MAX_HEADS - 1) / MAX_HEADS;
    float *memory = headrace::scratch_of<float>(0, headrace::num_threads() * MAX_HEADS * (D + out_width));
    headrace::stage(call.num_rows * call.num_groups * pieces, [&](int64_t task, int thread) {
        int64_t row = task / (call.num_groups * pieces), group = task / pieces % call.num_groups, piece = task % pieces;
        int64_t first = group * share + share * piece / pieces, end = group * share + share * (piece + 1) / pieces;
        float *query = memory + thread * MAX_HEADS * (D + out_width), *out = query + MAX_HEADS * D;
        for (int64_t h = first; h < end; h++)
            widen((const T *)call.query + row * call.query_row_stride + h * call.query_head_stride, D, D, 1.f,
                  (const T *)nullptr, query + (h - first) * D);
        const int32_t *pages = call.block_table + row * call.table_stride;
        int64_t stride = call.num_groups * D;
        auto find = [&](int64_t start, int count, const T **keys, const T **values) {
            for (int i = 0; i < count; i++) {
                int64_t at = start + i, page = pages[at / call.page_size], offset = at % call.page_size;
                keys[i] = (const T *)call.cache + (page * 2 * call.page_size + offset) * stride + group * D;
                values[i] = keys[i] + call.page_size * stride;
            }
        };
        attend<T>((int)(end - first), query, D, D, D, call.context_lens[row], call.scale, find, out, out_width);
        for (int64_t h = first; h < end; h++)
            narrow(out + (h - first) * out_width, D, (T *)call.out + (row * call.num_heads + h) * D);
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/gqa_decode.py. 0: done; 1: no memory.
EXPORT int ENTRY(gqa_decode)(const GqaDecode *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? gqa_decode<bf16>(*call) : gqa_decode<float>(*call); });
}
