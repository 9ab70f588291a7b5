"""`headrace_kernels.mla_prefill` on a GPU: two matrix products expand latents, then the kernel of causal attention.

The rotated part of the keys stays in the cache rows: the kernel reads it there, with a stride of 0 over the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import mla_prefill as family
from headrace_kernels.gpu.causal_attention import KeysValues, attend
from headrace_kernels.gpu.launch import AotCase
from headrace_kernels.linear import linear


def mla_prefill(
    query: Tensor,
    rows: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """See `headrace_kernels.mla_prefill.mla_prefill`."""
    num_heads, nope_dim, latent_dim = w_uk.shape
    latents = rows[:, :latent_dim]
    key = linear(latents, w_uk.view(-1, latent_dim)).view(-1, num_heads, nope_dim)
    value = linear(latents, w_uv.view(-1, latent_dim)).view(-1, num_heads, w_uv.shape[1])
    shared = rows[:, None, latent_dim:].expand(-1, num_heads, -1)
    keys = KeysValues(key, shared if shared.shape[2] else None, value)
    return attend(query, keys, query_starts, key_starts, scale=scale)


def aot_cases() -> list[AotCase]:
    """Heads of DeepSeek-V2-Lite, Kimi-K2 and DeepSeek-V3 behind a cached prefix."""

    def case(num_heads: int) -> AotCase:
        shapes = ((2048, num_heads, 192), (4096, 576), (num_heads, 128, 512), (num_heads, 128, 512))
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
        starts = torch.tensor([[0, 2048], [0, 4096]], dtype=torch.int32)
        return AotCase(
            f"mla_prefill H={num_heads} bfloat16",
            lambda: family.mla_prefill(*tensors, *starts, scale=0.1),
            uses_matrix_units=True,
        )

    return [case(num_heads) for num_heads in (16, 64, 128)]
