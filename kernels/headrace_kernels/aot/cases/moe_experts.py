"""Calls of `moe_experts` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import moe_experts as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.fp8_groups import FP8, num_groups


def aot_cases() -> list[AotCase]:
    """DeepSeek-V2-Lite with its shared experts folded in, Mixtral, and DeepSeek-V3 in fp8; few tokens, and a batch."""
    return [
        _aot_case("V2-Lite", 1, (66, 8, 2048, 1408), torch.bfloat16),
        _aot_case("Mixtral", 4, (8, 2, 4096, 14336), torch.bfloat16),
        _aot_case("V2-Lite", 4, (66, 8, 2048, 1408), torch.float32),
        _aot_case("V3", 1, (257, 9, 7168, 2048), torch.float8_e4m3fn),
        _aot_case("V2-Lite", 32, (66, 8, 2048, 1408), torch.bfloat16),
        _aot_case("V3 at EP8", 4096, (32, 8, 7168, 2048), torch.float8_e4m3fn, num_experts=256),
    ]


def _aot_case(
    model: str, num_tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, num_experts: int | None = None
) -> AotCase:
    num_local, top_k, hidden, width = shape
    is_scaled = dtype == FP8

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def call() -> Tensor:
        x = empty(num_tokens, hidden, dtype=torch.bfloat16 if is_scaled else dtype)
        experts, weights = empty(num_tokens, top_k, dtype=torch.int64), empty(num_tokens, top_k)
        gate_up, down = empty(num_local, 2 * width, hidden, dtype=dtype), empty(num_local, hidden, width, dtype=dtype)
        groups = (num_groups(hidden), num_groups(width))
        scales = (empty(num_local, 2 * groups[1], groups[0]), empty(num_local, *groups)) if is_scaled else None
        return family.moe_experts(
            x, experts, weights, gate_up, down, residual=x, num_experts=num_experts, scales=scales
        )

    name = f"{model}, {num_tokens} tokens, {str(dtype).removeprefix('torch.')}"
    return AotCase(name, call, uses_matrix_units=num_tokens > family.FEW_TOKENS)
