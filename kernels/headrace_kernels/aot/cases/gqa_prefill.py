"""Calls of `gqa_prefill` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import gqa_prefill as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Mixtral's heads over pages of 64 tokens."""
    query = torch.empty((2048, 32, 128), dtype=torch.bfloat16, device="meta")
    cache = torch.empty((256, 2, 64, 8, 128), dtype=torch.bfloat16, device="meta")
    slots = torch.empty((4096,), dtype=torch.int64, device="meta")
    starts = torch.tensor([[0, 1024, 2048], [0, 1024, 4096]], dtype=torch.int32)
    run = lambda: family.gqa_prefill(query, cache, slots, *starts, scale=0.1)  # noqa: E731
    return [AotCase("gqa_prefill H=32 G=8 D=128 page 64 bfloat16", run, uses_matrix_units=True)]
