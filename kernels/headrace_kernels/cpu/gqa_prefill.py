"""`headrace_kernels.gqa_prefill` compiled: `src/gqa_prefill.cpp`; keys and values in float32, a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import gqa_prefill as reference

_GqaPrefill = structure(
    "_GqaPrefill",
    query=ADDRESS,
    query_row_stride=INT,
    query_head_stride=INT,
    num_heads=INT,
    cache=ADDRESS,
    page_size=INT,
    num_groups=INT,
    head_dim=INT,
    slots=ADDRESS,
    num_sequences=INT,
    query_starts=ADDRESS,
    key_starts=ADDRESS,
    scale=FLOAT,
    out=ADDRESS,
)


def gqa_prefill(
    query: Tensor, cache: Tensor, slots: Tensor, query_starts: Tensor, key_starts: Tensor, *, scale: float
) -> Tensor:
    """See `headrace_kernels.gqa_prefill.gqa_prefill`."""
    if not takes(query.dtype) or query.stride(2) != 1:
        return reference.gqa_prefill(query, cache, slots, query_starts, key_starts, scale=scale)
    slots = slots.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    arguments = _GqaPrefill(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        query.shape[1],
        cache.data_ptr(),
        cache.shape[2],
        cache.shape[3],
        query.shape[2],
        slots.data_ptr(),
        len(query_starts) - 1,
        query_starts.data_ptr(),
        key_starts.data_ptr(),
        scale,
        out.data_ptr(),
    )
    call("gqa_prefill", arguments, query.dtype)
    return out
