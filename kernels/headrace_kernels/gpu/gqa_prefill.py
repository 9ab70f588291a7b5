"""`headrace_kernels.gqa_prefill` in Triton: the kernel of causal attention, reading keys and values by their slots."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.gpu.causal_attention import KeysValues, attend, first_width


def gqa_prefill(
    query: Tensor, cache: Tensor, slots: Tensor, query_starts: Tensor, key_starts: Tensor, *, scale: float
) -> Tensor:
    """See `headrace_kernels.gqa_prefill.gqa_prefill`."""
    page_size, num_groups, dim = cache.shape[2:]
    rows = cache.view(-1, num_groups, dim)
    first = first_width(dim)
    tail = rows[..., first:] if first < dim else None
    keys = KeysValues(rows[..., :first], tail, rows[page_size:], slots, page_size)
    return attend(query, keys, query_starts, key_starts, scale=scale)
