// Rows normalised by their root mean square, then times a weight.
#include "pool.h"
#include "rows.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t ROWS_A_TASK = 16;

struct RmsNorm {
    const void *x;
    int64_t x_stride, num_rows, N;
    const void *weight;
    float eps;
    void *y;
};

template <class T>
void rms_norm(const RmsNorm &call) {
    headrace::stage((call.num_rows + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](int64_t task, int) {
        for (int64_t row = task * ROWS_A_TASK; row < call.num_rows && row < (task + 1) * ROWS_A_TASK; row++) {
            const T *x = (const T *)call.x + row * call.x_stride, *weight = (const T *)call.weight;
            T *y = (T *)call.y + row * call.N;
            float scale = norm_scale(x, call.N, call.eps);
            int64_t n = 0;
            for (; n + LANES <= call.N; n += LANES) store(y + n, rounded(x, load(x + n) * scale) * load(weight + n));
            int some = (int)(call.N - n);
            if (some > 0) store_some(y + n, rounded(x, load_some(x + n, some) * scale) * load_some(weight + n, some), some);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/rms_norm.py. 0: done; 1: no memory.
EXPORT int ENTRY(rms_norm)(const RmsNorm *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? rms_norm<bf16>(*call) : rms_norm<float>(*call); });
}
