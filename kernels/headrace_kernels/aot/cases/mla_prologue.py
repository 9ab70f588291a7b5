"""Calls of `mla_prologue` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import mla_prologue as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.latent_fp8 import row_bytes


def aot_cases() -> list[AotCase]:
    """Decode rows of DeepSeek-V2-Lite, Kimi-K2 and DeepSeek-V3, with caches in bfloat16 and fp8."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def case(num_heads: int, dtype: torch.dtype, cache: Tensor, name: str) -> AotCase:
        projected = meta(64, 1536 + 576, dtype=dtype)
        c_kv, k_pe = projected[:, 1536:].split([512, 64], dim=1)
        query, w_uk = meta(64, num_heads, 192, dtype=dtype), meta(num_heads, 128, 512, dtype=dtype)
        angles, slots = meta(64, 32, dtype=torch.float32), meta(64, dtype=torch.int64)
        row = (c_kv, k_pe, meta(512, dtype=dtype), angles, angles, cache, slots)
        return AotCase(
            f"mla_prologue H={num_heads} {name}",
            lambda: family.mla_prologue(query, w_uk, *row, eps=1e-6, is_interleaved=True),
            uses_matrix_units=dtype == torch.bfloat16,
        )

    fp8 = meta(4096, row_bytes(512, 64), dtype=torch.uint8)
    return [
        case(16, torch.bfloat16, meta(4096, 576), "bf16"),
        case(64, torch.bfloat16, meta(4096, 576), "bf16"),
        case(128, torch.bfloat16, fp8, "bf16, fp8 cache"),
        case(16, torch.float32, meta(4096, 576, dtype=torch.float32), "fp32"),
    ]
