// A linear layer with what stands before and after it: y = norm(x) @ weight.T + bias + residual.
#include <algorithm>

#include "panel.h"
#include "pool.h"
#include "rows.h"

namespace HEADRACE_ISA {
namespace {

// Rows computed together stay in the second-level cache beside a panel; more at once only take memory.
constexpr int64_t CACHED_FLOATS = 48 * 1024;
constexpr int64_t MOST_ROWS = 512;
constexpr int TASKS_PER_THREAD = 6;

struct Linear {
    const void *x;
    int64_t x_stride, num_rows, K;
    const void *norm_weight;
    int64_t is_normed;
    float eps;
    const void *weight;
    int64_t O;
    const void *bias, *residual;
    int64_t residual_stride;
    void *y;
    int64_t y_stride;
};

template <class T>
void linear(const Linear &call, int dtype) {
    int64_t padded = padded_terms(call.K, dtype), num_panels = (call.O + LANES - 1) / LANES;
    for (int64_t first = 0; first < call.num_rows; first += MOST_ROWS) {
        int64_t num_rows = call.num_rows - first < MOST_ROWS ? call.num_rows - first : MOST_ROWS;
        float *wide = headrace::scratch_of<float>(0, num_rows * padded);
        const float **rows = headrace::scratch_of<const float *>(1, num_rows);
        int64_t rows_a_task = num_rows <= 2 * MAX_ROWS ? num_rows : 2 * MAX_ROWS;
        headrace::stage((num_rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
            for (int64_t i = task * rows_a_task; i < num_rows && i < (task + 1) * rows_a_task; i++) {
                const T *x = (const T *)call.x + (first + i) * call.x_stride;
                float scale = call.is_normed ? norm_scale(x, call.K, call.eps) : 1.f;
                rows[i] = wide + i * padded;
                widen(x, call.K, padded, scale, (const T *)call.norm_weight, wide + i * padded);
            }
        });
        int64_t block = CACHED_FLOATS / std::max<int64_t>(padded, 1) / MAX_ROWS * MAX_ROWS;
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
                const T *weights = (const T *)call.weight + panel * panel_size(call.K, dtype);
                Lanes bias = call.bias == nullptr ? all(0.f) : load_some((const T *)call.bias + column, width);
                all_rows(count, rows + start, weights, padded, [&](int64_t row, Lanes sum) {
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
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? linear<bf16>(*call, dtype) : linear<float>(*call, dtype); });
}
