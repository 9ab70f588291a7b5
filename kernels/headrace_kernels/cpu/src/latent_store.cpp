// Latents of prompt chunks to the cache, by the same code as those of decode rows in mla_prologue.cpp.
#include "latent_row.h"
#include "pool.h"

namespace HEADRACE_ISA {
namespace {

template <class T>
void store_latents(const LatentRows &rows) {
    int64_t width = rows.D + rows.R;
    float *memory = headrace::scratch_of<float>(0, headrace::num_threads() * width);
    headrace::stage(rows.num_rows, [&](int64_t row, int thread) { store_latent<T>(rows, row, memory + thread * width); });
}

}  // namespace
}  // namespace HEADRACE_ISA

using namespace HEADRACE_ISA;

// See cpu/latent_store.py. 0: done; 1: no memory.
EXPORT int ENTRY(latent_norm_rope_store)(const LatentRows *rows, int dtype, int num_threads) {
    return headrace::in_turn(num_threads, [&] { dtype == BFLOAT16 ? store_latents<bf16>(*rows) : store_latents<float>(*rows); });
}
