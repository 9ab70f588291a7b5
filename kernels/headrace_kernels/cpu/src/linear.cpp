// A linear layer with what stands before and after it: y = norm(x) @ weight.T + bias + residual.
#include <algorithm>

#include "pool.h"
#include "weights.h"

namespace HEADRACE_ISA {
namespace {

// Rows computed together stay in the second-level cache beside a panel; more at once only take memory.
constexpr int64_t CACHED_BYTES = 192 * 1024;
constexpr int64_t MOST_ROWS = 512;
constexpr int TASKS_PER_THREAD = 6;

struct Linear {
    const void *x;
    int64_t x_stride, num_rows, K;
    const void *norm_weight;
    int64_t is_normed;
    float eps;
    const void *weight;
    Scales scales;
    int64_t O;
    const void *bias, *residual;
    int64_t residual_stride;
    void *y;
    int64_t y_stride;
};

template <class T, class Weights>
void linear(const Linear &call) {
    using Term = typename Weights::Term;
    int64_t size = Weights::row_size(call.K), num_panels = (call.O + LANES - 1) / LANES;
    int64_t panel_size = Weights::terms(call.K) * LANES;
    for (int64_t first = 0; first < call.num_rows; first += MOST_ROWS) {
        int64_t num_rows = call.num_rows - first < MOST_ROWS ? call.num_rows - first : MOST_ROWS;
        Term *prepared = headrace::scratch_of<Term>(0, num_rows * size);
        const Term **rows = headrace::scratch_of<const Term *>(1, num_rows);
        int64_t rows_a_task = num_rows <= 2 * MAX_ROWS ? num_rows : 2 * MAX_ROWS;
        headrace::stage((num_rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
            for (int64_t i = task * rows_a_task; i < num_rows && i < (task + 1) * rows_a_task; i++) {
                const T *x = (const T *)call.x + (first + i) * call.x_stride;
                float scale = call.is_normed ? norm_scale(x, call.K, call.eps) : 1.f;
                rows[i] = prepared + i * size;
                Weights::prepare(x, call.K, scale, (const T *)call.norm_weight, prepared + i * size);
            }
        });
        int64_t block = CACHED_BYTES / std::max<int64_t>(size * sizeof(Term), 1) / MAX_ROWS * MAX_ROWS;
        block = block < MAX_ROWS ? MAX_ROWS : block;
        int64_t num_blocks = (num_rows + block - 1) / block;
        int64_t wanted = TASKS_PER_THREAD * headrace::num_threads();
        int64_t panels_a_task = num_panels * num_blocks / wanted;
        panels_a_task = panels_a_task < 1 ? 1 : panels_a_task > 16 ? 16 : panels_a_task;
        int64_t tasks_a_block = (num_panels + panels_a_task - 1) / panels_a_task;
        headrace::stage(tasks_a_block * num_blocks, [&](int64_t task, int) {
            int64_t start = task / tasks_a_block * block;
            int64_t count = num_rows - start < block ? num_rows - start : block;
            int64_t panel = task % tasks_a_block * panels_a_task, end = panel + panels_a_task;
            for (; panel < end && panel < num_panels; panel++) {
                int64_t column = panel * LANES;
                int width = (int)(call.O - column < LANES ? call.O - column : LANES);
                const auto *weights = (const typename Weights::Weight *)call.weight + panel * panel_size;
                Lanes bias = call.bias == nullptr ? all(0.f) : load_some((const T *)call.bias + column, width);
                Scales scales = of_panel(call.scales, panel, call.K);
                Weights::multiply(count, rows + start, weights, scales, call.K, [&](int64_t row, Lanes sum) {
                    int64_t at = first + start + row;
                    sum = sum + bias;
                    T *to = (T *)call.y + at * call.y_stride + column;
                    const T *residual = (const T *)call.residual + at * call.residual_stride + column;
                    if (width == LANES) {
                        if (call.residual != nullptr) sum = sum + load(residual);
                        store(to, sum);
                    } else {
                        if (call.residual != nullptr) sum = sum + load_some(residual, width);
                        store_some(to, sum, width);
                    }
                });
            }
        });
    }
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/linear.py. 0: done; 1: no memory.
EXPORT int ENTRY(linear)(const Linear *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] {
        dtype == BFLOAT16 ? linear<bf16, WideWeights<bf16>>(*call) : linear<float, WideWeights<float>>(*call);
    });
}

// See cpu/int8_linear.py. 0: done; 1: no memory.
EXPORT int ENTRY(int8_linear)(const Linear *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] {
        dtype == BFLOAT16 ? linear<bf16, ByteWeights>(*call) : linear<float, ByteWeights>(*call);
    });
}

// See cpu/fp8_linear.py. 0: done; 1: no memory.
EXPORT int ENTRY(fp8_linear)(const Linear *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] {
        dtype == BFLOAT16 ? linear<bf16, Fp8Weights>(*call) : linear<float, Fp8Weights>(*call);
    });
}
