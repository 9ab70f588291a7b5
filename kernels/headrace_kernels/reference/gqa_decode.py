"""`headrace_kernels.gqa_decode` in plain torch: keys and values are gathered, then multiplied in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.paged_slots import paged_slots
from headrace_kernels.split_ranges import SplitPlan


def gqa_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.gqa_decode.gqa_decode`."""
    if slots is None:
        slots = paged_slots(block_table, context_lens, cache.shape[2])
    batch, longest = slots.shape
    key, value = gather_keys_values(cache, slots.view(-1))
    num_groups, dim = cache.shape[3], cache.shape[4]
    grouped = query.view(batch, num_groups, -1, dim)
    key = key.view(batch, longest, num_groups, dim).transpose(1, 2)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float().mul_(scale)
    past_end = torch.arange(longest, device=slots.device) >= context_lens[:, None]
    scores.masked_fill_(past_end[:, None, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    value = value.view(batch, longest, num_groups, dim).transpose(1, 2)
    return torch.matmul(weights, value).view(batch, -1, dim)


def plan_gqa_decode(context_lens: Tensor, page_size: int, num_kv_heads: int) -> None:
    """See `headrace_kernels.gqa_decode.plan_gqa_decode`: a context is not split here."""


def gather_keys_values(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and the values [S, G, D] that lie at `slots` [S] int64 of `cache` [P, 2, page_size, G, D]."""
    page_size, num_groups, dim = cache.shape[2:]
    rows = cache.view(-1, num_groups * dim)
    # A page's values follow its page_size keys, so page p starts at row 2 * p * page_size.
    key_rows = slots + slots.div(page_size, rounding_mode="floor") * page_size
    key = rows.index_select(0, key_rows).view(-1, num_groups, dim)
    return key, rows.index_select(0, key_rows + page_size).view(-1, num_groups, dim)
