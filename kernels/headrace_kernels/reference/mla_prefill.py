"""`headrace_kernels.mla_prefill` in plain torch: latents are expanded for `causal_attention`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.causal_attention import causal_attention
from headrace_kernels.mla_prefill import expand


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
    key, value = expand(query, rows, w_uk, w_uv)
    return causal_attention(query, key, value, query_starts, key_starts, scale=scale)
