"""Calls of `grouped_gemm` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import grouped_gemm as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.expert_blocks import empty_blocks
from headrace_kernels.fp8_groups import FP8, num_groups


def aot_cases() -> list[AotCase]:
    """Expert shapes of DeepSeek-V2-Lite, Mixtral and DeepSeek-V3; each block size, type and place to quantise once."""
    return [
        _aot_case((2048, 1408), torch.bfloat16, 16),
        _aot_case((4096, 14336), torch.bfloat16, 32),
        _aot_case((4096, 14336), torch.bfloat16, 64),
        _aot_case((2048, 1408), torch.bfloat16, 128),
        _aot_case((2048, 1408), torch.float32, 16),
        _aot_case((2048, 1408), torch.float32, 128),
        _aot_case((7168, 2048), torch.float8_e4m3fn, 16),
        _aot_case((7168, 2048), torch.float8_e4m3fn, 32),
        _aot_case((7168, 2048), torch.float8_e4m3fn, 64),
        _aot_case((7168, 2048), torch.float8_e4m3fn, 128),
    ]


def _aot_case(shape: tuple[int, int], dtype: torch.dtype, block_size: int) -> AotCase:
    """A layer of 8 experts for 64 tokens of 2 each; activations come quantised to blocks of 64 rows or more."""
    hidden, width = shape
    is_scaled = dtype == FP8
    is_quantised = is_scaled and block_size >= 64
    hidden_groups, width_groups = (num_groups(n) if is_scaled else 0 for n in shape)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def activations(rows: int, columns: int, num_groups: int) -> tuple[Tensor, Tensor | None]:
        x = empty(rows, columns, dtype=torch.bfloat16 if is_scaled and not is_quantised else dtype)
        return x, empty(rows, num_groups) if is_quantised else None

    def call() -> None:
        experts = empty(64, 2, dtype=torch.int64)
        blocks = empty_blocks(128, 8, 8, block_size, experts)
        x, x_scale = activations(64, hidden, hidden_groups)
        scale = empty(8, 2 * width_groups, hidden_groups) if is_scaled else None
        family.experts_gate_up(x, empty(8, 2 * width, hidden, dtype=dtype), blocks, scale, x_scale)
        rows, rows_scale = activations(len(blocks.assignment), width, width_groups)
        scale = empty(8, hidden_groups, width_groups) if is_scaled else None
        out = family.experts_down(rows, empty(8, hidden, width, dtype=dtype), blocks, scale, rows_scale)
        family.combine_assignments(out, experts, empty(64, 2), range(8), empty(64, hidden, dtype=out.dtype))

    name = f"experts {hidden}x{width} {str(dtype).removeprefix('torch.')} blocks of {block_size}"
    return AotCase(name, call, uses_matrix_units=dtype != torch.float32)
