"""Calls of `mla_decode` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import mla_decode as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.latent_fp8 import row_bytes


def aot_cases() -> list[AotCase]:
    """DeepSeek-V2-Lite and DeepSeek-V3 with 64-token pages, bf16, fp8 and float32 rows; a fixed number of splits."""

    def case(num_heads: int, cache_dtype: torch.dtype, num_splits: int | None = None) -> AotCase:
        is_fp8 = cache_dtype == torch.uint8
        width, dtype = (row_bytes(512, 64), torch.bfloat16) if is_fp8 else (576, cache_dtype)
        query = torch.empty(32, num_heads, 576, dtype=dtype, device="meta")
        cache = torch.empty(4096, 64, width, dtype=cache_dtype, device="meta")
        block_table, context_lens = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((32, 512), (32,)))
        arguments = (query, cache, block_table, context_lens)
        return AotCase(
            f"mla_decode H{num_heads} {cache_dtype} splits {num_splits or 'planned'}",
            lambda: family.mla_decode(*arguments, kv_lora_rank=512, scale=0.1, num_splits=num_splits),
            uses_matrix_units=dtype == torch.bfloat16,
        )

    caches = (torch.bfloat16, torch.uint8)
    planned = [case(heads, dtype) for heads in (16, 128) for dtype in caches]
    return [*planned, case(16, torch.bfloat16, num_splits=8), case(16, torch.float32)]
