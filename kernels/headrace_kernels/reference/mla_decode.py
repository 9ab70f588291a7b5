"""`headrace_kernels.mla_decode` in plain torch: rows are gathered, then multiplied in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.latent_fp8 import unpack_latents
from headrace_kernels.paged_slots import paged_slots
from headrace_kernels.split_ranges import SplitPlan


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.mla_decode.mla_decode`."""
    if slots is None:
        slots = paged_slots(block_table, context_lens, cache.shape[1])
    batch, longest = slots.shape
    rows = cache.view(-1, cache.shape[2]).index_select(0, slots.view(-1))
    if cache.dtype == torch.uint8:
        rows = unpack_latents(rows, kv_lora_rank, query.shape[2] - kv_lora_rank).to(query.dtype)
    rows = rows.view(batch, longest, query.shape[2])
    scores = torch.bmm(query, rows.transpose(1, 2)).float().mul_(scale)
    past_end = torch.arange(longest, device=slots.device) >= context_lens[:, None]
    scores.masked_fill_(past_end[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    # Over whole rows: the columns of k_pe cost less than the copy that a slice would.
    return torch.bmm(weights, rows)[..., :kv_lora_rank]


def plan_mla_decode(context_lens: Tensor, page_size: int, num_heads: int) -> None:
    """See `headrace_kernels.mla_decode.plan_mla_decode`: a context is not split here."""
