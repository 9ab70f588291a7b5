// silu(gate) * up, for rows of gate columns, then up columns.
#include "pool.h"
#include "simd.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t VALUES_A_TASK = 16384;

struct SiluMul {
    const void *gate_up;
    int64_t stride, num_rows, I;
    void *y;
};

template <class T>
void silu_mul(const SiluMul &call) {
    int64_t rows_a_task = 1 + VALUES_A_TASK / (call.I + 1);
    headrace::stage((call.num_rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
        for (int64_t row = task * rows_a_task; row < call.num_rows && row < (task + 1) * rows_a_task; row++) {
            const T *gate = (const T *)call.gate_up + row * call.stride, *up = gate + call.I;
            T *y = (T *)call.y + row * call.I;
            int64_t i = 0;
            for (; i + LANES <= call.I; i += LANES) store(y + i, silu_times(load(gate + i), load(up + i)));
            int some = (int)(call.I - i);
            if (some > 0) store_some(y + i, silu_times(load_some(gate + i, some), load_some(up + i, some)), some);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/silu_mul.py. 0: done; 1: no memory.
EXPORT int ENTRY(silu_mul)(const SiluMul *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? silu_mul<bf16>(*call) : silu_mul<float>(*call); });
}
