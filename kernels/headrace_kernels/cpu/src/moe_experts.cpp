// All experts of a mixture-of-experts layer: down(silu(gate(x)) * up(x)), weighted and added up per token.
//
// Each expert's weights are read once, by the rows of the tokens that chose it; experts nobody chose are not read. Who
// owns columns of the output adds the experts up in their order, so nothing is scattered and the order of a sum is one.
#include <algorithm>

#include "pool.h"
#include "weights.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t CACHED_BYTES = 192 * 1024;
constexpr int64_t MOST_TOKENS = 512;
constexpr int64_t HIDDEN_FLOATS = 4 << 20;

struct MoeExperts {
    const void *x;
    int64_t x_stride, num_tokens, N;
    const int64_t *experts;
    const float *weights;
    int64_t K, first_local, num_local;
    const void *gate_up, *down;
    Scales gate_up_scales, down_scales;
    int64_t I;
    const void *residual;
    int64_t residual_stride;
    void *y;
    int64_t y_stride;
};

struct Assignment {
    int32_t token;
    float weight;
};

// The assignments of the local experts in the order of experts, then tokens; those of expert e are starts[e] ...
void sort(const MoeExperts &call, int64_t first, int64_t count, int64_t *starts, Assignment *sorted) {
    for (int64_t e = 0; e <= call.num_local + 1; e++) starts[e] = 0;
    const int64_t *experts = call.experts + first * call.K;
    for (int64_t i = 0; i < count * call.K; i++) {
        int64_t e = experts[i] - call.first_local;
        if (0 <= e && e < call.num_local) starts[e + 2]++;
    }
    for (int64_t e = 2; e <= call.num_local + 1; e++) starts[e] += starts[e - 1];
    for (int64_t i = 0; i < count * call.K; i++) {
        int64_t e = experts[i] - call.first_local;
        if (0 <= e && e < call.num_local)
            sorted[starts[e + 1]++] = {(int32_t)(i / call.K), call.weights[first * call.K + i]};
    }
}

// Let `rows` point at the hidden rows [num_rows, width] of I terms, as the weights want them.
template <class Weights>
void prepare_hidden(int64_t I, int64_t width, int64_t num_rows, const float *hidden,
                    const typename Weights::Term **rows) {
    if constexpr (Weights::ROWS_ARE_FLOATS) {
        for (int64_t i = 0; i < num_rows; i++) rows[i] = hidden + i * width;
    } else {
        int64_t size = Weights::row_size(I), rows_a_task = num_rows <= 8 ? num_rows : 8;
        auto *prepared = headrace::scratch_of<typename Weights::Term>(7, num_rows * size + 1);
        headrace::stage((num_rows + rows_a_task - 1) / std::max<int64_t>(rows_a_task, 1), [&](int64_t task, int) {
            for (int64_t i = task * rows_a_task; i < num_rows && i < (task + 1) * rows_a_task; i++) {
                rows[i] = prepared + i * size;
                Weights::prepare(hidden + i * width, I, 1.f, (const float *)nullptr, prepared + i * size);
            }
        });
    }
}

template <class T, class Weights>
void some_tokens(const MoeExperts &call, int64_t first, int64_t count) {
    using Term = typename Weights::Term;
    using Weight = typename Weights::Weight;
    int64_t row_size = Weights::row_size(call.N), width = (call.I + LANES - 1) / LANES * LANES;
    int64_t hidden_panels = width / LANES, output_panels = (call.N + LANES - 1) / LANES;
    int64_t most = count * call.K;
    Term *prepared = headrace::scratch_of<Term>(0, count * row_size);
    int64_t *starts = headrace::scratch_of<int64_t>(1, call.num_local + 2);
    Assignment *sorted = headrace::scratch_of<Assignment>(2, most + 1);
    float *hidden = headrace::scratch_of<float>(3, most * width + 1);
    // Where each assignment's token lies, and its hidden row.
    const Term **rows = headrace::scratch_of<const Term *>(4, 2 * most + 1), **hidden_rows = rows + most;
    int64_t *active = headrace::scratch_of<int64_t>(5, call.num_local + 1), num_active = 0;
    float *sums = headrace::scratch_of<float>(6, headrace::num_threads() * count * LANES);
    sort(call, first, count, starts, sorted);
    for (int64_t e = 0; e < call.num_local; e++)
        if (starts[e + 1] > starts[e]) active[num_active++] = e;
    for (int64_t i = 0; i < starts[call.num_local]; i++) {
        rows[i] = prepared + sorted[i].token * row_size;
    }
    int64_t rows_a_task = count <= 8 ? count : 8;
    headrace::stage((count + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
        for (int64_t i = task * rows_a_task; i < count && i < (task + 1) * rows_a_task; i++)
            Weights::prepare((const T *)call.x + (first + i) * call.x_stride, call.N, 1.f, (const T *)nullptr,
                             prepared + i * row_size);
    });

    int64_t size = Weights::terms(call.N) * LANES;
    int64_t block = CACHED_BYTES / std::max<int64_t>(row_size * sizeof(Term), 1) / MAX_ROWS * MAX_ROWS;
    block = block < MAX_ROWS ? MAX_ROWS : block;
    int64_t wanted = 6 * headrace::num_threads(), panels_a_task = hidden_panels * num_active / wanted;
    panels_a_task = panels_a_task < 1 ? 1 : panels_a_task > hidden_panels ? hidden_panels : panels_a_task;
    int64_t tasks_an_expert = (hidden_panels + panels_a_task - 1) / panels_a_task;
    headrace::stage(num_active * tasks_an_expert, [&](int64_t task, int) {
        int64_t e = active[task / tasks_an_expert], first_panel = task % tasks_an_expert * panels_a_task;
        for (int64_t start = starts[e]; start < starts[e + 1]; start += block) {
            int64_t num_rows = starts[e + 1] - start < block ? starts[e + 1] - start : block;
            for (int64_t p = first_panel; p < first_panel + panels_a_task && p < hidden_panels; p++) {
                const Weight *gate = (const Weight *)call.gate_up + (e * hidden_panels + p) * 2 * size;
                Scales gate_scales = of_panel(call.gate_up_scales, (e * hidden_panels + p) * 2, call.N);
                Scales up_scales = of_panel(gate_scales, 1, call.N);
                float *to = hidden + start * width + p * LANES;
                Weights::multiply(num_rows, rows + start, gate, gate_scales, call.N,
                                  [&](int64_t row, const Lanes &sum) { store(to + row * width, sum); });
                Weights::multiply(num_rows, rows + start, gate + size, up_scales, call.N,
                                  [&](int64_t row, const Lanes &sum) {
                                      store(to + row * width, silu_times(load(to + row * width), sum));
                                  });
            }
        }
    });

    prepare_hidden<Weights>(call.I, width, starts[call.num_local], hidden, hidden_rows);
    int64_t down_size = Weights::terms(call.I) * LANES;
    headrace::stage(output_panels, [&](int64_t panel, int thread) {
        float *sum = sums + thread * count * LANES;
        int64_t column = panel * LANES;
        int columns = (int)(call.N - column < LANES ? call.N - column : LANES);
        for (int64_t i = 0; i < count; i++) {
            const T *from = (const T *)call.residual + (first + i) * call.residual_stride + column;
            store(sum + i * LANES, call.residual == nullptr ? all(0.f) : load_some(from, columns));
        }
        for (int64_t a = 0; a < num_active; a++) {
            int64_t e = active[a], start = starts[e];
            int64_t at = e * output_panels + panel;
            const Weight *weights = (const Weight *)call.down + at * down_size;
            Scales scales = of_panel(call.down_scales, at, call.I);
            Weights::multiply(starts[e + 1] - start, hidden_rows + start, weights, scales, call.I,
                              [&](int64_t row, const Lanes &product) {
                                  Assignment of = sorted[start + row];
                                  float *to = sum + of.token * LANES;
                                  store(to, add_product(product, all(of.weight), load(to)));
                              });
        }
        for (int64_t i = 0; i < count; i++)
            store_some((T *)call.y + (first + i) * call.y_stride + column, load(sum + i * LANES), columns);
    });
}

template <class T, class Weights>
void moe_experts(const MoeExperts &call) {
    int64_t width = (call.I + LANES - 1) / LANES * LANES, most = HIDDEN_FLOATS / std::max<int64_t>(width * call.K, 1);
    most = most < MAX_ROWS ? MAX_ROWS : most > MOST_TOKENS ? MOST_TOKENS : most;
    for (int64_t first = 0; first < call.num_tokens; first += most)
        some_tokens<T, Weights>(call, first, call.num_tokens - first < most ? call.num_tokens - first : most);
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/experts.py. 0: done; 1: no memory.
EXPORT int ENTRY(moe_experts)(const MoeExperts *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] {
        dtype == BFLOAT16 ? moe_experts<bf16, WideWeights<bf16>>(*call) : moe_experts<float, WideWeights<float>>(*call);
    });
}

// See cpu/int8_experts.py. 0: done; 1: no memory.
EXPORT int ENTRY(int8_moe_experts)(const MoeExperts *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] {
        dtype == BFLOAT16 ? moe_experts<bf16, ByteWeights>(*call) : moe_experts<float, ByteWeights>(*call);
    });
}

// See cpu/fp8_experts.py. 0: done; 1: no memory.
EXPORT int ENTRY(fp8_moe_experts)(const MoeExperts *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] {
        dtype == BFLOAT16 ? moe_experts<bf16, Fp8Weights>(*call) : moe_experts<float, Fp8Weights>(*call);
    });
}
