// Grouped-query attention of prompt chunks over paged keys and values, read where they lie.
#include "prefill_attention.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t MOST_QUERIES = 512;

struct GqaPrefill {
    const void *query;
    int64_t query_row_stride, query_head_stride, num_heads;
    const void *cache;
    int64_t page_size, num_groups, D;
    const int64_t *slots;
    int64_t num_sequences;
    const int32_t *query_starts, *key_starts;
    float scale;
    void *out;
};

template <class T>
void gqa_prefill(const GqaPrefill &call) {
    int64_t D = call.D, padded = (D + LANES - 1) / LANES * LANES, share = call.num_heads / call.num_groups, longest = 0;
    for (int64_t b = 0; b < call.num_sequences; b++) {
        int64_t count = call.query_starts[b + 1] - call.query_starts[b];
        longest = count > longest ? count : longest;
    }
    longest = longest < MOST_QUERIES ? longest : MOST_QUERIES;
    size_t own = (Workspace::floats(longest * share, D, D, 0) + LANES - 1) / LANES * LANES;
    float *memory = headrace::scratch_of<float>(0, own * headrace::num_threads());
    int64_t stride = call.num_groups * D;
    headrace::stage(call.num_sequences * call.num_groups, [&](int64_t task, int thread) {
        int64_t b = task / call.num_groups, group = task % call.num_groups;
        Workspace work(memory + thread * own, longest * share, D, D);
        int64_t q0 = call.query_starts[b], q1 = call.query_starts[b + 1];
        int64_t k0 = call.key_starts[b], k1 = call.key_starts[b + 1];
        auto fill = [&](int64_t first, int count) {
            const T *keys[TILE];
            for (int i = 0; i < count; i++) {
                int64_t slot = call.slots[k0 + first + i], page = slot / call.page_size;
                keys[i] = (const T *)call.cache + (slot + page * call.page_size) * stride + group * D;
                const T *values = keys[i] + call.page_size * stride;
                for (int64_t d = 0; d < padded; d += LANES) {
                    int some = (int)(D - d < LANES ? D - d : LANES);
                    store(work.values + (d / LANES * TILE + i) * LANES,
                          some == LANES ? load(values + d) : load_some(values + d, some));
                }
            }
            transpose_keys(keys, count, D, 0, D, work.keys);
        };
        for (int64_t first = q0; first < q1; first += MOST_QUERIES) {
            int64_t count = q1 - first < MOST_QUERIES ? q1 - first : MOST_QUERIES;
            for (int64_t i = 0; i < count * share; i++)
                widen((const T *)call.query + (first + i / share) * call.query_row_stride +
                          (group * share + i % share) * call.query_head_stride,
                      D, D, 1.f, (const T *)nullptr, work.queries + i * D);
            attend_causally(work, count, share, k1 - k0 - (q1 - first - count), D, D, call.scale, fill);
            for (int64_t i = 0; i < count * share; i++)
                narrow(work.sums + i * padded, D,
                       (T *)call.out + ((first + i / share) * call.num_heads + group * share + i % share) * D);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/gqa_prefill.py. 0: done; 1: no memory.
EXPORT int ENTRY(gqa_prefill)(const GqaPrefill *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? gqa_prefill<bf16>(*call) : gqa_prefill<float>(*call); });
}
