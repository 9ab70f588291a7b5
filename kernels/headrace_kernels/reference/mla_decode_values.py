"""`headrace_kernels.mla_decode.mla_decode_values` in plain torch: `mla_decode`, then a product in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.mla_decode import mla_decode
from headrace_kernels.split_ranges import SplitPlan


def mla_decode_values(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.mla_decode.mla_decode_values`."""
    kv_lora_rank = w_uv.shape[2]
    latents = mla_decode(
        query, cache, block_table, context_lens, kv_lora_rank=kv_lora_rank, scale=scale, slots=slots, plan=plan
    )
    return torch.bmm(latents.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1).flatten(1)
