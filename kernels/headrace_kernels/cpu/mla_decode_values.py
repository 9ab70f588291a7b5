"""`headrace_kernels.mla_decode.mla_decode_values` compiled: as `mla_decode`; latents are not rounded in between."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.mla_decode import does_take, run
from headrace_kernels.reference import mla_decode_values as reference
from headrace_kernels.split_ranges import SplitPlan


def mla_decode_values(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.mla_decode.mla_decode_values`."""
    if not does_take(query, cache):
        return reference.mla_decode_values(
            query,
            cache,
            block_table,
            context_lens,
            w_uv,
            scale=scale,
            slots=slots,
            plan=plan,
            num_splits=num_splits,
        )
    num_heads, value_dim, kv_lora_rank = w_uv.shape
    out = query.new_empty(len(query), num_heads * value_dim)
    run(query, cache, block_table, context_lens, kv_lora_rank, scale, w_uv, out)
    return out
