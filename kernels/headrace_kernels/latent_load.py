"""Read rows of a latent cache, whatever its format: what attention of prompts expands to keys and values.

Shapes: S rows to read, P rows in the cache, D latent width, R rope width. A plain cache has rows [D + R]; an fp8 cache
has rows of bytes (`latent_fp8`).
Bytes moved for an fp8 cache: S * (row bytes + (D + R) * itemsize), so the kernel is bound by memory bandwidth.

`latent_load` is the entry, `latent_load_ref` the specification it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.latent_fp8 import row_bytes, unpack_latents


def latent_load(cache: Tensor, slots: Tensor, *, kv_lora_rank: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """Return rows `slots` of `cache`, in order.

    Args:
        cache: [P, D + R] of `dtype`, or fp8 rows, [P, row_bytes(D, R)] uint8; rows contiguous.
        slots: [S] int64, each in [0, P).
        kv_lora_rank: D.
        rope_dim: R.
        dtype: any float dtype; values of an fp8 row are rounded to it once, from float32.

    Returns:
        [S, D + R] of `dtype`, contiguous.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    is_fp8 = cache.dtype == torch.uint8
    width = row_bytes(kv_lora_rank, rope_dim) if is_fp8 else kv_lora_rank + rope_dim
    if cache.dtype not in (torch.uint8, dtype) or cache.shape[1:] != (width,) or cache.stride(1) != 1:
        raise ValueError(
            f"cache {tuple(cache.shape)} {cache.dtype} has no contiguous rows of {kv_lora_rank} + {rope_dim} {dtype}"
        )
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots {tuple(slots.shape)} {slots.dtype} must be [S] int64")
    if not is_fp8:
        return cache.index_select(0, slots)
    return select("latent_load", cache).latent_load(
        cache, slots, kv_lora_rank=kv_lora_rank, rope_dim=rope_dim, dtype=dtype
    )


def latent_load_ref(cache: Tensor, slots: Tensor, *, kv_lora_rank: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """Specification of `latent_load` in plain torch."""
    rows = cache.index_select(0, slots)
    return unpack_latents(rows, kv_lora_rank, rope_dim).to(dtype) if cache.dtype == torch.uint8 else rows
