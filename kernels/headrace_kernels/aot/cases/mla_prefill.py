"""Calls of `mla_prefill` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import mla_prefill as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Heads of DeepSeek-V2-Lite, Kimi-K2 and DeepSeek-V3 behind a cached prefix."""

    def case(num_heads: int) -> AotCase:
        shapes = ((2048, num_heads, 192), (4096, 576), (num_heads, 128, 512), (num_heads, 128, 512))
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
        starts = torch.tensor([[0, 2048], [0, 4096]], dtype=torch.int32)
        return AotCase(
            f"mla_prefill H={num_heads} bfloat16",
            lambda: family.mla_prefill(*tensors, *starts, scale=0.1),
            uses_matrix_units=True,
        )

    return [case(num_heads) for num_heads in (16, 64, 128)]
