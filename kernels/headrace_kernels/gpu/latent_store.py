"""`headrace_kernels.latent_store` in Triton: one program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.latent_rows import norm_rope_store, row_arguments, row_constants
from headrace_kernels.gpu.launch import launch


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See `headrace_kernels.latent_store.latent_store`."""
    num_tokens, width = latents.shape
    launch(
        _latent_store_kernel,
        (num_tokens,),
        *(latents, latents.stride(0), cache, cache.stride(0), slot_mapping, width),
        IS_FLOAT=latents.is_floating_point(),
        BLOCK_N=triton.next_power_of_2(width),
        num_warps=4 if width > 1024 else 2,
    )


def latent_norm_rope_store(
    c_kv: Tensor,
    k_pe: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float,
    is_interleaved: bool,
) -> None:
    """See `headrace_kernels.latent_store.latent_norm_rope_store`."""
    launch(
        _latent_norm_rope_store_kernel,
        (len(c_kv),),
        row_arguments(c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping),
        eps,
        num_warps=1,
        **row_constants(c_kv, k_pe, is_interleaved=is_interleaved),
    )


@triton.jit
def _latent_store_kernel(
    latents_ptr,
    latents_stride,
    cache_ptr,
    cache_stride,
    slots_ptr,
    width,
    IS_FLOAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        n = tl.arange(0, BLOCK_N)
        is_inside = n < width
        row = tl.load(latents_ptr + token * latents_stride + n, mask=is_inside, other=0)
        if IS_FLOAT:
            wide = row.to(tl.float32)
            is_finite = tl.min((tl.abs(wide) < float("inf")).to(tl.int32), axis=0) > 0
            row = tl.where(is_finite, wide, float("nan")).to(row.dtype)
        tl.store(cache_ptr + slot * cache_stride + n, row, mask=is_inside)


@triton.jit
def _latent_norm_rope_store_kernel(
    row,
    eps,
    IS_INTERLEAVED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    norm_rope_store(token, row, eps, IS_INTERLEAVED, NUM_GROUPS, BLOCK_R, IS_INTERPRETED)
