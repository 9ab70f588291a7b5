"""`headrace_kernels.latent_load` in Triton: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.fp8_groups import GROUP, num_groups
from headrace_kernels.gpu.latent_rows import fp8_parts
from headrace_kernels.gpu.launch import launch

_GROUP = tl.constexpr(GROUP)


def latent_load(cache: Tensor, slots: Tensor, *, kv_lora_rank: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """See `headrace_kernels.latent_load.latent_load`; `cache` has fp8 rows."""
    rows = torch.empty((len(slots), kv_lora_rank + rope_dim), dtype=dtype, device=cache.device)
    latents, scales, pe = fp8_parts(cache, kv_lora_rank, rope_dim)
    launch(
        _latent_load_kernel,
        (len(slots),),
        *(latents, latents.stride(0), scales, scales.stride(0), pe, pe.stride(0), slots, rows, kv_lora_rank, rope_dim),
        NUM_GROUPS=triton.next_power_of_2(num_groups(kv_lora_rank)),
        BLOCK_R=triton.next_power_of_2(max(rope_dim, 1)),
        num_warps=1,
    )
    return rows


@triton.jit
def _latent_load_kernel(
    latents_ptr,
    latents_stride,
    scales_ptr,
    scales_stride,
    pe_ptr,
    pe_stride,
    slots_ptr,
    rows_ptr,
    latent_dim,
    rope_dim,
    NUM_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    rows_ptr += row * (latent_dim + rope_dim)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    group = tl.arange(0, NUM_GROUPS)
    n = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    is_latent = n < latent_dim
    latents = tl.load(latents_ptr + slot * latents_stride + n, mask=is_latent, other=0.0).to(tl.float32)
    scales = tl.load(scales_ptr + slot * scales_stride + group, mask=group * _GROUP < latent_dim, other=0.0)
    tl.store(rows_ptr + n, (latents * scales[:, None]).to(dtype), mask=is_latent)
    r = tl.arange(0, BLOCK_R)
    is_rope = r < rope_dim
    pe = tl.load(pe_ptr + slot * pe_stride + r, mask=is_rope, other=0.0).to(tl.float32)
    tl.store(rows_ptr + latent_dim + r, pe.to(dtype), mask=is_rope)
