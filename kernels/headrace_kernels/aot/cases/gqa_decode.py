"""Calls of `gqa_decode` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import gqa_decode as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Mixtral-8x7B with 64-token pages, bf16 and float32; a fixed number of splits."""
    block_table, context_lens = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((32, 512), (32,)))

    def case(dtype: torch.dtype, num_splits: int | None = None) -> AotCase:
        query = torch.empty(32, 32, 128, dtype=dtype, device="meta")
        cache = torch.empty(4096, 2, 64, 8, 128, dtype=dtype, device="meta")
        return AotCase(
            f"gqa_decode H32 G8 D128 {dtype} splits {num_splits or 'planned'}",
            lambda: family.gqa_decode(query, cache, block_table, context_lens, scale=0.1, num_splits=num_splits),
            uses_matrix_units=dtype == torch.bfloat16,
        )

    return [case(torch.bfloat16), case(torch.bfloat16, 8), case(torch.float32)]
