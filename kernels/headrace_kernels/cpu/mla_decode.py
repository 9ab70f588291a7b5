"""Absorbed latent attention compiled: `src/mla_decode.cpp`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, address, structure
from headrace_kernels.cpu.library import call

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
    query: Tensor, cache: Tensor, block_table: Tensor, context_lens: Tensor, *, kv_lora_rank: int, scale: float
) -> Tensor:
    """Return [B, H, D]: see the family's entry; `cache` has rows of the dtype of `query`, float32 or bfloat16."""
    out = query.new_empty(*query.shape[:2], kv_lora_rank)
    _run(query, cache, block_table, context_lens, kv_lora_rank, scale, None, 0, out)
    return out


def mla_decode_values(
    query: Tensor, cache: Tensor, block_table: Tensor, context_lens: Tensor, w_uv: Tensor, *, scale: float
) -> Tensor:
    """Return [B, H * Dv]: see the family's entry; the latents are not rounded in between."""
    num_heads, value_dim, kv_lora_rank = w_uv.shape
    out = query.new_empty(len(query), num_heads * value_dim)
    _run(query, cache, block_table, context_lens, kv_lora_rank, scale, w_uv, value_dim, out)
    return out


def _run(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    kv_lora_rank: int,
    scale: float,
    w_uv: Tensor | None,
    value_dim: int,
    out: Tensor,
) -> None:
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
        value_dim,
        out.data_ptr(),
    )
    call("mla_decode", arguments, query.dtype)
