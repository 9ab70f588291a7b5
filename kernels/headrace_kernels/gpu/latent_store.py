"""`headrace_kernels.latent_store` in Triton: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels import latent_store as family
from headrace_kernels.gpu.latent_rows import norm_rope_store, row_arguments, row_constants
from headrace_kernels.gpu.launch import AotCase, launch
from headrace_kernels.latent_fp8 import row_bytes


def latent_store(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See `headrace_kernels.latent_store.latent_store`."""
    num_tokens, width = latents.shape
    launch(
        _latent_store_kernel,
        (num_tokens,),
        *(latents, latents.stride(0), cache, cache.stride(0), slot_mapping, width),
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


def aot_cases() -> list[AotCase]:
    """The latents of DeepSeek, ready and new, for a cache in bfloat16 and in fp8; the keys of Mixtral."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ready(width: int) -> AotCase:
        slots = meta(64, dtype=torch.int64)
        run = lambda: family.latent_store(meta(64, width), meta(4096, width), slots)  # noqa: E731
        return AotCase(f"latent_store {width} bf16", run)

    def new(cache: Tensor, name: str, *, is_interleaved: bool) -> AotCase:
        c_kv, k_pe = meta(64, 3072 + 576)[:, 3072:].split([512, 64], dim=1)
        angles, slots = meta(64, 32, dtype=torch.float32), meta(64, dtype=torch.int64)
        return AotCase(
            f"latent_norm_rope_store 512+64 {name}",
            lambda: family.latent_norm_rope_store(
                c_kv, k_pe, meta(512), angles, angles, cache, slots, eps=1e-6, is_interleaved=is_interleaved
            ),
        )

    fp8 = meta(4096, row_bytes(512, 64), dtype=torch.uint8)
    return [
        ready(576),
        ready(1024),
        new(meta(4096, 576), "bf16", is_interleaved=True),
        new(meta(4096, 576), "bf16 by halves", is_interleaved=False),
        new(fp8, "fp8", is_interleaved=True),
    ]


@triton.jit
def _latent_store_kernel(latents_ptr, latents_stride, cache_ptr, cache_stride, slots_ptr, width, BLOCK_N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        n = tl.arange(0, BLOCK_N)
        is_inside = n < width
        row = tl.load(latents_ptr + token * latents_stride + n, mask=is_inside)
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
