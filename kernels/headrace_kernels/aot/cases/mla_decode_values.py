"""Calls of `mla_decode_values` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import mla_decode as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """DeepSeek-V2-Lite and DeepSeek-V3, one row and many."""

    def case(num_rows: int, num_heads: int) -> AotCase:
        query, cache, w_uv = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((num_rows, num_heads, 576), (4096, 64, 576), (num_heads, 128, 512))
        )
        block_table = torch.empty(num_rows, 512, dtype=torch.int32, device="meta")
        context_lens = torch.empty(num_rows, dtype=torch.int32, device="meta")
        return AotCase(
            f"mla_decode_values B{num_rows} H{num_heads} bf16",
            lambda: family.mla_decode_values(query, cache, block_table, context_lens, w_uv, scale=0.1),
            uses_matrix_units=True,
        )

    return [case(1, 16), case(128, 128)]
