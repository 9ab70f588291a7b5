// Between the projections and the attention of a decode row: its latent to the cache, its queries absorbed.
#include "latent_row.h"
#include "pool.h"

namespace HEADRACE_ISA {
namespace {

struct MlaPrologue {
    LatentRows latents;
    const void *query;
    int64_t query_row_stride, query_head_stride, num_heads, nope_dim;
    const void *w_uk;
    int64_t w_head_stride, w_row_stride;
    void *out;
};

// out[rows][16] = rows [K] times 16 columns of a plain weight [K][...], summed over k in order.
template <int ROWS, class T>
INLINE void columns_product(const float *rows, int64_t row_stride, const T *weight, int64_t weight_stride, int64_t K,
                            int some, T *out, int64_t out_stride) {
    Lanes sum[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) sum[r] = all(0.f);
    for (int64_t k = 0; k < K; k++) {
        Lanes at = some == LANES ? load(weight + k * weight_stride) : load_some(weight + k * weight_stride, some);
        UNROLL for (int r = 0; r < ROWS; r++) {
            vfloat term = splat(rows[r * row_stride + k]);
            UNROLL for (int i = 0; i < PARTS; i++) sum[r].part[i] = sum[r].part[i] + term * at.part[i];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) store_some(out + r * out_stride, sum[r], some);
}

template <class T>
void mla_prologue(const MlaPrologue &call) {
    const LatentRows &rows = call.latents;
    int64_t H = call.num_heads, Dn = call.nope_dim, D = rows.D, R = rows.R, width = D + R;
    float *queries = headrace::scratch_of<float>(0, H * rows.num_rows * Dn + 1);
    float *memory = headrace::scratch_of<float>(1, headrace::num_threads() * (D + 2 * R));
    headrace::stage(rows.num_rows, [&](int64_t row, int thread) {
        float *scratch = memory + thread * (D + 2 * R);
        store_latent<T>(rows, row, scratch);
        for (int64_t h = 0; h < H; h++) {
            const T *query = (const T *)call.query + row * call.query_row_stride + h * call.query_head_stride;
            widen(query, Dn, Dn, 1.f, (const T *)nullptr, queries + (h * rows.num_rows + row) * Dn);
            turn(query + Dn, R, rows.cos + row * (R / 2), rows.sin + row * (R / 2), rows.is_interleaved, scratch);
            narrow(scratch, R, (T *)call.out + (row * H + h) * width + D);
        }
    });
    constexpr int64_t COLUMNS = 8 * LANES;
    int64_t pieces = (D + COLUMNS - 1) / COLUMNS;
    headrace::stage(H * pieces, [&](int64_t task, int) {
        int64_t h = task / pieces, end = (task % pieces + 1) * COLUMNS;
        for (int64_t column = task % pieces * COLUMNS; column < end && column < D; column += LANES) {
            int some = (int)(D - column < LANES ? D - column : LANES);
            const T *weight = (const T *)call.w_uk + h * call.w_head_stride + column;
            for (int64_t row = 0; row < rows.num_rows;) {
                int64_t left = rows.num_rows - row;
                const float *from = queries + (h * rows.num_rows + row) * Dn;
                T *to = (T *)call.out + (row * H + h) * width + column;
                if (left >= 6) columns_product<6>(from, Dn, weight, call.w_row_stride, Dn, some, to, H * width), row += 6;
                else if (left >= 3)
                    columns_product<3>(from, Dn, weight, call.w_row_stride, Dn, some, to, H * width), row += 3;
                else columns_product<1>(from, Dn, weight, call.w_row_stride, Dn, some, to, H * width), row += 1;
            }
        }
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/mla_prologue.py. 0: done; 1: no memory.
EXPORT int ENTRY(mla_prologue)(const MlaPrologue *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? mla_prologue<bf16>(*call) : mla_prologue<float>(*call); });
}
