// Rows to their slots in the cache: latents of prompt chunks, by the same code as those of decode rows in
// mla_prologue.cpp, and rows that are copied.
#include "latent_row.h"
#include "pool.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t ROWS_A_TASK = 8;

struct CopiedRows {
    const void *x;
    int64_t x_stride, num_rows, width;
    void *cache;
    int64_t cache_stride;
    const int64_t *slots;
};

template <class T>
void store_latents(const LatentRows &rows) {
    int64_t width = rows.D + rows.R;
    float *memory = headrace::scratch_of<float>(0, headrace::num_threads() * width);
    headrace::stage(rows.num_rows, [&](int64_t row, int thread) { store_latent<T>(rows, row, memory + thread * width); });
}

// A row that is not finite becomes NaN throughout.
template <class T>
void copy_rows(const CopiedRows &call) {
    headrace::stage((call.num_rows + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](int64_t task, int) {
        for (int64_t row = task * ROWS_A_TASK; row < call.num_rows && row < (task + 1) * ROWS_A_TASK; row++) {
            if (call.slots[row] < 0) continue;
            const T *x = (const T *)call.x + row * call.x_stride;
            T *to = (T *)call.cache + call.slots[row] * call.cache_stride;
            Lanes zeros = all(0.f);
            int64_t d = 0;
            for (; d + LANES <= call.width; d += LANES) zeros = zeros + load(x + d) * 0.f;
            if (d < call.width) zeros = zeros + load_some(x + d, (int)(call.width - d)) * 0.f;
            if (add_up(zeros) == 0.f) memcpy(to, x, call.width * sizeof(T));
            else
                for (d = 0; d < call.width; d++) from_float(to + d, NAN);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/latent_store.py. 0: done; 1: no memory.
EXPORT int ENTRY(latent_norm_rope_store)(const LatentRows *rows, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? store_latents<bf16>(*rows) : store_latents<float>(*rows); });
}

EXPORT int ENTRY(latent_store)(const CopiedRows *rows, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? copy_rows<bf16>(*rows) : copy_rows<float>(*rows); });
}
