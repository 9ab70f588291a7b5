"""Grouped-query attention of prompt chunks over paged keys and values.

Shapes: T query tokens, S key tokens over all sequences, H query heads, G key/value heads, D head width, P pages.
FLOPs: those of `causal_attention`; bound by compute. On "triton" keys and values are read where they lie, page by page;
nothing is gathered.

`gqa_prefill` is the entry; `gqa_prefill_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.causal_attention import causal_attention_ref, check_starts
from headrace_kernels.dispatch import select


def gqa_prefill(
    query: Tensor,
    cache: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return causal attention over the keys and values at `slots`.

    Args:
        query: [T, H, D], dtype of `cache`.
        cache: [P, 2, page_size, G, D], contiguous.
        slots: [S] int64, the slots of each sequence's tokens, in order, sequence after sequence.
        query_starts: [B + 1] int32 on the host; see `causal_attention`.
        key_starts: [B + 1] int32 on the host.
        scale: multiplies the scores.

    Returns:
        [T, H, D], dtype of `query`.

    Raises:
        ValueError: the shapes, types or starts do not fit.
    """
    if query.shape[2] != cache.shape[4] or query.shape[1] % cache.shape[3] or query.dtype != cache.dtype:
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} and cache {tuple(cache.shape)} {cache.dtype} "
            "do not fit [T, H, D], [P, 2, page_size, G, D]"
        )
    if slots.ndim != 1 or slots.dtype != torch.int64 or not cache.is_contiguous():
        raise ValueError(f"slots {tuple(slots.shape)} {slots.dtype} must be [S] int64 and the cache contiguous")
    check_starts(query_starts, key_starts, len(query), len(slots), scale)
    return select("gqa_prefill", query).gqa_prefill(query, cache, slots, query_starts, key_starts, scale=scale)


def gqa_prefill_ref(
    query: Tensor,
    cache: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Specification of `gqa_prefill` in plain torch."""
    page_size = cache.shape[2]
    page_ids, offsets = slots // page_size, slots % page_size
    key, value = cache[page_ids, 0, offsets], cache[page_ids, 1, offsets]
    return causal_attention_ref(query, key, value, query_starts, key_starts, scale=scale)
