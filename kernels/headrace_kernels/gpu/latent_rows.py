"""Make the cache row of one new token: what `latent_norm_rope_store` and `mla_prologue` have in common."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.fp8_groups import FP8, FP8_MAX, GROUP, SMALLEST_MAXIMUM, num_groups
from headrace_kernels.gpu.fp8 import quantise
from headrace_kernels.gpu.launch import is_interpreted
from headrace_kernels.gpu.rms_norm import normalise
from headrace_kernels.gpu.rope import rotate

_GROUP = tl.constexpr(GROUP)
_SMALLEST_MAXIMUM = tl.constexpr(SMALLEST_MAXIMUM)
_FP8_MAX = tl.constexpr(FP8_MAX)


def row_arguments(
    c_kv: Tensor, k_pe: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slot_mapping: Tensor
) -> tuple[Any, ...]:
    """Return `row` of `norm_rope_store`; the cache is in it as views of its parts."""
    latent_dim, rope_dim = c_kv.shape[1], k_pe.shape[1]
    new = (c_kv, c_kv.stride(0), k_pe, k_pe.stride(0), norm_weight, cos.contiguous(), sin.contiguous(), slot_mapping)
    if cache.dtype != torch.uint8:
        latents, pe = cache.split([latent_dim, rope_dim], dim=1)
        stored = (latents, latents.stride(0), None, 0, pe, pe.stride(0))
    else:
        latents, scales, pe = fp8_parts(cache, latent_dim, rope_dim)
        stored = (latents, latents.stride(0), scales, scales.stride(0), pe, pe.stride(0))
    return (*new, *stored, latent_dim, rope_dim // 2)


def fp8_parts(cache: Tensor, latent_dim: int, rope_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents [S, D] fp8, scales [S, ceil(D / 128)] float32 and rope columns [S, R] bfloat16: views of rows."""
    latents, scales, pe = cache.split([latent_dim, num_groups(latent_dim) * 4, rope_dim * 2], dim=1)
    return latents.view(FP8), scales.view(torch.float32), pe.view(torch.bfloat16)


def row_constants(c_kv: Tensor, k_pe: Tensor, *, is_interleaved: bool) -> dict[str, Any]:
    """Return the compile-time arguments of `norm_rope_store`."""
    return {
        "IS_INTERLEAVED": is_interleaved,
        "NUM_GROUPS": triton.next_power_of_2(triton.cdiv(c_kv.shape[1], GROUP)),
        "BLOCK_R": triton.next_power_of_2(max(k_pe.shape[1] // 2, 1)),
        "IS_INTERPRETED": is_interpreted(),
    }


@triton.jit
def norm_rope_store(
    token,
    row,
    eps,
    IS_INTERLEAVED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
) -> None:
    """Normalise, rotate and store the row of `token` (int64), unless its slot is -1: then nothing more is read.

    `row` is what `row_arguments` returns.
    """
    c_ptr, c_stride, pe_ptr, pe_stride, weight_ptr, cos_ptr, sin_ptr, slots_ptr = row[:8]
    latents_ptr, latents_stride, scales_ptr, scales_stride, cached_pe_ptr, cached_pe_stride = row[8:14]
    latent_dim, half = row[14:]
    dtype: tl.constexpr = c_ptr.dtype.element_ty
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        group = tl.arange(0, NUM_GROUPS)
        n = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        is_inside = n < latent_dim
        x = tl.load(c_ptr + token * c_stride + n, mask=is_inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n, mask=is_inside, other=0.0).to(tl.float32)
        latent = normalise(x, tl.sum(tl.sum(x * x, axis=1), axis=0) / latent_dim, weight, eps, dtype)
        if scales_ptr is not None:
            values, scales = quantise(latent.to(tl.float32), _SMALLEST_MAXIMUM, _FP8_MAX, IS_INTERPRETED)
            tl.store(latents_ptr + slot * latents_stride + n, values, mask=is_inside)
            tl.store(scales_ptr + slot * scales_stride + group, scales, mask=group * _GROUP < latent_dim)
        else:
            tl.store(latents_ptr + slot * latents_stride + n, latent, mask=is_inside)
        pair = tl.arange(0, BLOCK_R)
        is_pair = pair < half
        cos = tl.load(cos_ptr + token * half + pair, mask=is_pair, other=0.0)
        sin = tl.load(sin_ptr + token * half + pair, mask=is_pair, other=0.0)
        # The key is rotated as a lone head.
        head = tl.arange(0, 1)
        halves = rotate(pe_ptr + token * pe_stride + head, 1, head == 0, cos, sin, half, BLOCK_R, IS_INTERLEAVED)
        out_ptrs = cached_pe_ptr + slot * cached_pe_stride + head[:, None] + pair[None, :]
        # First to the computing dtype, as the specification does; an fp8 row then has them in bfloat16, which has no
        # number for the largest of float32.
        pe_dtype: tl.constexpr = cached_pe_ptr.dtype.element_ty
        first, second = halves[0].to(dtype).to(pe_dtype).to(tl.float32), halves[1].to(dtype).to(pe_dtype).to(tl.float32)
        # Pairs past the key were read as 0.
        are_finite = (tl.abs(first) < float("inf")) & (tl.abs(second) < float("inf"))
        is_finite = tl.min(are_finite.to(tl.int32), axis=1)[:, None] > 0
        first, second = tl.where(is_finite, first, float("nan")), tl.where(is_finite, second, float("nan"))
        tl.store(out_ptrs, first.to(pe_dtype), mask=is_pair[None, :])
        tl.store(out_ptrs + half, second.to(pe_dtype), mask=is_pair[None, :])
