"""Grouped-query attention of single query tokens over paged keys and values.

Shapes: B query tokens, H query heads, G key/value heads, D head width, P pages, L longest context. A page holds its
tokens' keys, then their values. Query b attends to the first `context_lens[b]` tokens of its sequence.
Bytes read: sum(context_lens) * 2 * G * D * itemsize; FLOPs: sum(context_lens) * 4 * H * D. With 4 query heads a
key/value head in bfloat16 that is 4 FLOPs a byte: bound by memory bandwidth.

`gqa_decode` is the entry; `gqa_decode_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.decode_rows import check_paged_rows
from headrace_kernels.dispatch import select
from headrace_kernels.split_ranges import SplitPlan


def gqa_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    slots: Tensor | None = None,
    plan: SplitPlan | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Return each query's average of the values, weighted by softmax over its context.

    On a GPU a context is computed in splits, combined afterwards. What `plan` and `num_splits` promise about rounding
    is what they promise in `mla_decode`: the same bits for the same batch, or with `num_splits` for the same row.

    Args:
        query: [B, H, D], its last dimension contiguous, dtype of `cache`; on a CPU all of it is contiguous.
        cache: [P, 2, page_size, G, D], contiguous; slots past a context may hold anything. On a GPU page_size is a
            multiple of 16.
        block_table: [B, max_pages] int32; entries past a context are not read.
        context_lens: [B] int32, each at least 1; on a GPU it may be 0, which gives zeros.
        scale: multiplies the scores.
        slots: [B, L] int64, `paged_slots` of the three arguments before, if the caller has planned it already; not
            used on a GPU.
        plan: of `plan_gqa_decode` for `context_lens`, if the caller has made it already; used on a GPU only.
        num_splits: see above; used on a GPU only.

    Returns:
        [B, H, D], dtype of `query`; scores and softmax in float32.

    Raises:
        ValueError: a shape or dtype does not fit, or there are both `plan` and `num_splits`.
    """
    _check(query, cache)
    check_paged_rows(query.shape[0], cache.shape[2], block_table, context_lens, plan, num_splits)
    return select("gqa_decode", query).gqa_decode(
        query, cache, block_table, context_lens, scale=scale, slots=slots, plan=plan, num_splits=num_splits
    )


def plan_gqa_decode(context_lens: Tensor, page_size: int, num_kv_heads: int) -> SplitPlan | None:
    """Return the plan that every layer's `gqa_decode` of a step may share; None where none is used, on a CPU.

    Args:
        context_lens: [B] int32, each at least 0.
        page_size: tokens a page holds.
        num_kv_heads: G.

    Raises:
        ValueError: see `plan_splits`.
    """
    return select("gqa_decode", context_lens).plan_gqa_decode(context_lens, page_size, num_kv_heads)


def gqa_decode_ref(query: Tensor, cache: Tensor, block_table: Tensor, context_lens: Tensor, *, scale: float) -> Tensor:
    """Specification of `gqa_decode` in plain torch."""
    page_size, group = cache.shape[2], query.shape[1] // cache.shape[3]
    out = torch.empty_like(query)
    for b, length in enumerate(context_lens.tolist()):
        pages = cache[block_table[b, : -(-length // page_size)].long()].float()
        key = pages[:, 0].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        value = pages[:, 1].flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,khd->hk", query[b].float(), key) * scale
        out[b] = torch.einsum("hk,khd->hd", torch.softmax(scores, dim=-1), value).to(query.dtype)
    return out


def _check(query: Tensor, cache: Tensor) -> None:
    is_shaped = query.ndim == 3 and cache.ndim == 5 and cache.shape[1] == 2 and query.shape[2] == cache.shape[4]
    if not is_shaped or query.shape[1] % cache.shape[3] or query.dtype != cache.dtype:
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} and cache {tuple(cache.shape)} {cache.dtype} "
            "do not fit [B, H, D], [P, 2, page_size, G, D]"
        )
    if query.stride(2) != 1 or not cache.is_contiguous():
        raise ValueError("query's last dimension and all of cache must be contiguous")
