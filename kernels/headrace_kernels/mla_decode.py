"""Absorbed latent attention of single query tokens over a paged latent cache.

Shapes: B query tokens, H heads, D latent width (kv_lora_rank), R rope width, P pages, L longest context. A cache row is
`c_kv` [D] then `k_pe` [R]; W_UK is already folded into the query and W_UV is applied by the caller, so that keys are
the rows and values their first D columns. Query b attends to the first `context_lens[b]` tokens of its sequence.
Bytes read: sum(context_lens) * (D + R) * itemsize; the kernel is bound by memory bandwidth below about D FLOPs a byte.

`mla_decode` is the entry; `mla_decode_ref` is the specification it is tested against.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.paged_slots import paged_slots


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    slots: Tensor | None = None,
) -> Tensor:
    """Return each query's average of the latents, weighted by softmax over its context.

    Args:
        query: [B, H, D + R], dtype of `cache`.
        cache: [P, page_size, D + R], contiguous; slots past a context may hold anything.
        block_table: [B, max_pages] int32; entries past a context are not read.
        context_lens: [B] int32, each at least 1.
        kv_lora_rank: D.
        scale: multiplies the scores.
        slots: [B, L] int64, `paged_slots` of the three arguments before, if the caller has planned it already.

    Returns:
        [B, H, D], dtype of `query`; scores and softmax in float32.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if query.shape[2:] != cache.shape[2:] or query.dtype != cache.dtype:
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} and cache {tuple(cache.shape)} {cache.dtype} "
            "do not fit [B, H, D + R], [P, page_size, D + R]"
        )
    if slots is None:
        slots = paged_slots(block_table, context_lens, cache.shape[1])
    batch, longest = slots.shape
    rows = cache.view(-1, cache.shape[2]).index_select(0, slots.view(-1))
    rows = rows.view(batch, longest, cache.shape[2])
    scores = torch.bmm(query, rows.transpose(1, 2)).float().mul_(scale)
    past_end = torch.arange(longest, device=slots.device) >= context_lens[:, None]
    scores.masked_fill_(past_end[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    # Over whole rows: the columns of k_pe cost less than the copy that a slice would.
    return torch.bmm(weights, rows)[..., :kv_lora_rank]


def mla_decode_ref(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> Tensor:
    """Specification of `mla_decode` in plain torch."""
    page_size = cache.shape[1]
    out = query.new_empty((*query.shape[:2], kv_lora_rank))
    for b, length in enumerate(context_lens.tolist()):
        num_pages = -(-length // page_size)
        rows = cache[block_table[b, :num_pages].long()].flatten(0, 1)[:length].float()
        weights = torch.softmax(query[b].float() @ rows.T * scale, dim=-1)
        out[b] = (weights @ rows[:, :kv_lora_rank]).to(query.dtype)
    return out
