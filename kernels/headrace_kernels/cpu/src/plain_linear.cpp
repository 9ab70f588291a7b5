// A linear layer whose weight lies as a checkpoint has it, row by row: of an embedding that is the head, too.
//
// Lanes are terms here. A sum is the same for any number of rows: sixteen partial sums, added up in one order.
#include "pool.h"
#include "rows.h"

namespace HEADRACE_ISA {
namespace {

constexpr int64_t OUTPUTS_A_TASK = 64;

struct PlainLinear {
    const void *x;
    int64_t x_stride, num_rows, K;
    const void *weight;
    int64_t weight_stride, O;
    const void *bias;
    void *y;
};

template <int ROWS, int OUTPUTS, class T>
INLINE void products(const PlainLinear &call, const float *x, int64_t row, int64_t output) {
    Lanes sum[ROWS][OUTPUTS] = {};
    const T *weight = (const T *)call.weight + output * call.weight_stride;
    int64_t K = call.K, whole = K / LANES * LANES;
    for (int64_t k = 0; k < K; k += LANES) {
        int some = (int)(k < whole ? LANES : K - k);
        Lanes from[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++)
            from[r] = some == LANES ? load(x + r * K + k) : load_some(x + r * K + k, some);
        UNROLL for (int o = 0; o < OUTPUTS; o++) {
            const T *at = weight + o * call.weight_stride + k;
            Lanes terms = some == LANES ? load(at) : load_some(at, some);
            UNROLL for (int r = 0; r < ROWS; r++) sum[r][o] = add_product(from[r], terms, sum[r][o]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int o = 0; o < OUTPUTS; o++) {
            float bias = call.bias == nullptr ? 0.f : to_float(((const T *)call.bias)[output + o]);
            from_float((T *)call.y + (row + r) * call.O + output + o, add_up(sum[r][o]) + bias);
        }
}

template <class T>
void plain_linear(const PlainLinear &call) {
    float *wide = headrace::scratch_of<float>(0, call.num_rows * call.K + 1);
    for (int64_t row = 0; row < call.num_rows; row++)
        widen((const T *)call.x + row * call.x_stride, call.K, call.K, 1.f, (const T *)nullptr, wide + row * call.K);
    headrace::stage((call.O + OUTPUTS_A_TASK - 1) / OUTPUTS_A_TASK, [&](int64_t task, int) {
        int64_t output = task * OUTPUTS_A_TASK, end = output + OUTPUTS_A_TASK < call.O ? output + OUTPUTS_A_TASK : call.O;
        for (; output < end; output += 2) {
            int64_t row = 0;
            if (output + 1 == end) {
                for (; row < call.num_rows; row++) products<1, 1, T>(call, wide + row * call.K, row, output);
                break;
            }
            for (; row + 2 <= call.num_rows; row += 2) products<2, 2, T>(call, wide + row * call.K, row, output);
            if (row < call.num_rows) products<1, 2, T>(call, wide + row * call.K, row, output);
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/linear.py. 0: done; 1: no memory.
EXPORT int ENTRY(plain_linear)(const PlainLinear *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? plain_linear<bf16>(*call) : plain_linear<float>(*call); });
}
