// Heads turned by their positions' angles.
#include "latent_row.h"
#include "pool.h"

namespace HEADRACE_ISA {
namespace {

struct Rope {
    const void *x;
    int64_t row_stride, head_stride, num_rows, num_heads, R;
    const float *cos, *sin;
    int64_t is_interleaved;
    void *y;
};

template <class T>
void rope(const Rope &call) {
    float *memory = headrace::scratch_of<float>(0, headrace::num_threads() * call.R + 1);
    headrace::stage(call.num_rows, [&](int64_t row, int thread) {
        float *turned = memory + thread * call.R;
        for (int64_t h = 0; h < call.num_heads; h++) {
            turn((const T *)call.x + row * call.row_stride + h * call.head_stride, call.R, call.cos + row * (call.R / 2),
                 call.sin + row * (call.R / 2), call.is_interleaved, turned);
            narrow(turned, call.R, (T *)call.y + (row * call.num_heads + h) * call.R);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/rope.py. 0: done; 1: no memory.
EXPORT int ENTRY(rope)(const Rope *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? rope<bf16>(*call) : rope<float>(*call); });
}
