// Between the projections and the attention of a decode row: its latent to the cache, its queries absorbed.
#include <algorithm>

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

// out[ROWS][BLOCKS * 16] = rows [K] times as many columns of a plain weight [K][...], summed over k in order. Few rows take
// more columns at once: a single sum would wait for itself.
template <int ROWS, int BLOCKS, class T>
INLINE void columns_product(const float *rows, int64_t row_stride, const T *weight, int64_t weight_stride, int64_t K,
                            T *out, int64_t out_stride) {
    Lanes sum[ROWS][BLOCKS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int b = 0; b < BLOCKS; b++) sum[r][b] = all(0.f);
    for (int64_t k = 0; k < K; k++)
        UNROLL for (int b = 0; b < BLOCKS; b++) {
            Lanes at = load(weight + k * weight_stride + b * LANES);
            UNROLL for (int r = 0; r < ROWS; r++) {
                vfloat term = splat(rows[r * row_stride + k]);
                UNROLL for (int i = 0; i < PARTS; i++) sum[r][b].part[i] = sum[r][b].part[i] + term * at.part[i];
            }
        }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int b = 0; b < BLOCKS; b++) store(out + r * out_stride + b * LANES, sum[r][b]);
}

// The same for the last columns, fewer than 16.
template <class T>
static void last_columns(const float *rows, int64_t row_stride, int64_t num_rows, const T *weight, int64_t weight_stride,
                         int64_t K, int some, T *out, int64_t out_stride) {
    for (int64_t r = 0; r < num_rows; r++) {
        Lanes sum = all(0.f);
        for (int64_t k = 0; k < K; k++) {
            Lanes at = load_some(weight + k * weight_stride, some);
            vfloat term = splat(rows[r * row_stride + k]);
            UNROLL for (int i = 0; i < PARTS; i++) sum.part[i] = sum.part[i] + term * at.part[i];
        }
        store_some(out + r * out_stride, sum, some);
    }
}

// All rows of a head times its columns `first` ... `end`.
template <int ROWS, int BLOCKS, class T>
INLINE int64_t some_rows(const float *rows, int64_t row_stride, int64_t num_rows, const T *weight, int64_t weight_stride,
                         int64_t K, int64_t first, int64_t end, T *out, int64_t out_stride) {
    int64_t row = 0;
    for (; row + ROWS <= num_rows; row += ROWS) {
        const float *from = rows + row * row_stride;
        T *to = out + row * out_stride;
        int64_t column = first;
        for (; column + BLOCKS * LANES <= end; column += BLOCKS * LANES)
            columns_product<ROWS, BLOCKS>(from, row_stride, weight + column, weight_stride, K, to + column, out_stride);
        for (; column + LANES <= end; column += LANES)
            columns_product<ROWS, 1>(from, row_stride, weight + column, weight_stride, K, to + column, out_stride);
        if (column < end)
            last_columns(from, row_stride, ROWS, weight + column, weight_stride, K, (int)(end - column), to + column,
                         out_stride);
    }
    return row;
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
        int64_t h = task / pieces, first = task % pieces * COLUMNS, end = std::min(first + COLUMNS, D);
        const T *weight = (const T *)call.w_uk + h * call.w_head_stride;
        const float *from = queries + h * rows.num_rows * Dn;
        T *to = (T *)call.out + h * width;
        int64_t stride = call.w_row_stride, num_rows = rows.num_rows, row = 0;
        row += some_rows<6, 1>(from, Dn, num_rows, weight, stride, Dn, first, end, to, H * width);
        row += some_rows<3, 2>(from + row * Dn, Dn, num_rows - row, weight, stride, Dn, first, end,
                               to + row * H * width, H * width);
        some_rows<1, 4>(from + row * Dn, Dn, num_rows - row, weight, stride, Dn, first, end, to + row * H * width,
                        H * width);
    });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/mla_prologue.py. 0: done; 1: no memory.
EXPORT int ENTRY(mla_prologue)(const MlaPrologue *call, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? mla_prologue<bf16>(*call) : mla_prologue<float>(*call); });
}
