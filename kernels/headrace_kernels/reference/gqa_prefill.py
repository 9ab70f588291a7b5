"""`headrace_kernels.gqa_prefill` in plain torch: keys and values are gathered for `causal_attention`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.causal_attention import causal_attention
from headrace_kernels.reference.gqa_decode import gather_keys_values


def gqa_prefill(
    query: Tensor, cache: Tensor, slots: Tensor, query_starts: Tensor, key_starts: Tensor, *, scale: float
) -> Tensor:
    """See `headrace_kernels.gqa_prefill.gqa_prefill`."""
    key, value = gather_keys_values(cache, slots)
    return causal_attention(query, key, value, query_starts, key_starts, scale=scale)
