"""`headrace_kernels.mla_prefill` on a GPU: two matrix products expand latents, then the kernel of causal attention.

The rotated part of the keys stays in the cache rows: the kernel reads it there, with a stride of 0 over the heads.
"""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.gpu.causal_attention import KeysValues, attend
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
