"""`headrace_kernels.mla_decode` compiled: `src/mla_decode.cpp`. Pages are read where they lie."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, address, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import mla_decode as reference
from headrace_kernels.split_ranges import SplitPlan

_MlaDecode = structure(
    "_MlaDecode",
    query=ADDRESS,
    query_row_stride=INT,
    query_head_stride=INT,
    num_rows=INT,
    num_heads=INT,
    cache=ADDRESS,
    page_size=INT,
    block_table=ADDRESS,
    table_stride=INT,
    context_lens=ADDRESS,
    latent_dim=INT,
    rope_dim=INT,
    scale=FLOAT,
    w_uv=ADDRESS,
    value_dim=INT,
    out=ADDRESS,
)


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.mla_decode.mla_decode`."""
    if not does_take(query, cache):
        return reference.mla_decode(
            query,
            cache,
            block_table,
            context_lens,
            kv_lora_rank=kv_lora_rank,
            scale=scale,
            slots=slots,
            plan=plan,
            num_splits=num_splits,
        )
    out = query.new_empty(*query.shape[:2], kv_lora_rank)
    run(query, cache, block_table, context_lens, kv_lora_rank, scale, None, out)
    return out


def plan_mla_decode(context_lens: Tensor, page_size: int, num_heads: int) -> None:
    """See `headrace_kernels.mla_decode.plan_mla_decode`: a context is not split here."""


def does_take(query: Tensor, cache: Tensor) -> bool:
    """Return whether the compiled kernel takes these: no fp8 rows."""
    return takes(query.dtype) and cache.dtype == query.dtype


def run(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    kv_lora_rank: int,
    scale: float,
    w_uv: Tensor | None,
    out: Tensor,
) -> None:
    """Compute the latents to `out` [B, H, D] or, with `w_uv`, the values to `out` [B, H * Dv]."""
    block_table, context_lens = block_table.contiguous(), context_lens.contiguous()
    arguments = _MlaDecode(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        query.shape[0],
        query.shape[1],
        cache.data_ptr(),
        cache.shape[1],
        block_table.data_ptr(),
        block_table.stride(0),
        context_lens.data_ptr(),
        kv_lora_rank,
        query.shape[2] - kv_lora_rank,
        scale,
        address(w_uv),
        0 if w_uv is None else w_uv.shape[1],
        out.data_ptr(),
    )
    call("mla_decode", arguments, query.dtype)
