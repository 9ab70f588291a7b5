"""`headrace_kernels.gqa_prefill` in Triton: the kernel of causal attention, reading keys and values by their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import gqa_prefill as family
from headrace_kernels.gpu.causal_attention import KeysValues, attend, first_width
from headrace_kernels.gpu.launch import AotCase


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


def aot_cases() -> list[AotCase]:
    """Mixtral's heads over pages of 64 tokens."""
    query = torch.empty((2048, 32, 128), dtype=torch.bfloat16, device="meta")
    cache = torch.empty((256, 2, 64, 8, 128), dtype=torch.bfloat16, device="meta")
    slots = torch.empty((4096,), dtype=torch.int64, device="meta")
    starts = torch.tensor([[0, 1024, 2048], [0, 1024, 4096]], dtype=torch.int32)
    run = lambda: family.gqa_prefill(query, cache, slots, *starts, scale=0.1)  # noqa: E731
    return [AotCase("gqa_prefill H=32 G=8 D=128 page 64 bfloat16", run, uses_matrix_units=True)]
