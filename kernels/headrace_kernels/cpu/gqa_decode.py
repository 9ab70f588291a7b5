"""`headrace_kernels.gqa_decode` compiled: `src/gqa_decode.cpp`. Pages are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import gqa_decode as reference
from headrace_kernels.split_ranges import SplitPlan

_GqaDecode = structure(
    "_GqaDecode",
    query=ADDRESS,
    query_row_stride=INT,
    query_head_stride=INT,
    num_rows=INT,
    num_heads=INT,
    cache=ADDRESS,
    page_size=INT,
    num_groups=INT,
    block_table=ADDRESS,
    table_stride=INT,
    context_lens=ADDRESS,
    head_dim=INT,
    scale=FLOAT,
    out=ADDRESS,
)


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
    if not takes(query.dtype):
        return reference.gqa_decode(
            query,
            cache,
            block_table,
            context_lens,
            scale=scale,
            slots=slots,
            plan=plan,
            num_splits=num_splits,
        )
    block_table, context_lens = block_table.contiguous(), context_lens.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    arguments = _GqaDecode(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        query.shape[0],
        query.shape[1],
        cache.data_ptr(),
        cache.shape[2],
        cache.shape[3],
        block_table.data_ptr(),
        block_table.stride(0),
        context_lens.data_ptr(),
        query.shape[2],
        scale,
        out.data_ptr(),
    )
    call("gqa_decode", arguments, query.dtype)
    return out


def plan_gqa_decode(context_lens: Tensor, page_size: int, num_kv_heads: int) -> None:
    """See `headrace_kernels.gqa_decode.plan_gqa_decode`: a context is not split here."""
