"""Calls of `decode_linear` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import decode_linear as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.fp8_groups import FP8, GROUP, num_groups
from headrace_kernels.linear import Linear


def aot_cases() -> list[AotCase]:
    """Projections of DeepSeek-V2-Lite, DeepSeek-V3 and Mixtral, for each number of tokens a program can take.

    Those in blocks of FP8: few rows, many, and the blocks of 64 rows that V3.2's indexer key makes of its neighbours'.
    """

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def norm(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, has_bias: bool) -> AotCase:
        x, norm_weight, weight, bias = (
            meta(*shape, dtype=dtype) for shape in ((tokens, inputs), (inputs,), (outputs, inputs), (outputs,))
        )
        return AotCase(
            f"norm_linear {dtype} T={tokens} {inputs} to {outputs}",
            lambda: family.norm_linear(x, norm_weight, weight, 1e-6, bias if has_bias else None),
            uses_matrix_units=dtype == torch.bfloat16,
        )

    def add(tokens: int, inputs: int, outputs: int) -> AotCase:
        x, weight, residual = meta(tokens, inputs), meta(outputs, inputs), meta(tokens, outputs)
        return AotCase(
            f"linear_add T={tokens} {inputs} to {outputs}",
            lambda: family.linear_add(x, weight, residual),
            uses_matrix_units=True,
        )

    def fp8(tokens: int, inputs: int, outputs: int, rows: int = GROUP) -> AotCase:
        x, norm_weight, residual = meta(tokens, inputs), meta(inputs), meta(tokens, outputs)
        scales = meta(-(-outputs // rows), num_groups(inputs), dtype=torch.float32)

        def call() -> None:
            layer = Linear(BlockFp8(meta(outputs, inputs, dtype=FP8), scales, (rows, GROUP)), dtype=x.dtype)
            layer.after_norm(x, norm_weight, 1e-6)
            layer.added_to(residual, x)

        return AotCase(f"fp8 blocks of {rows} T={tokens} {inputs} to {outputs}", call, uses_matrix_units=True)

    return [
        fp8(1, 7168, 2112),
        fp8(64, 1536, 24576),
        fp8(64, 7168, 2240, rows=64),
        fp8(512, 16384, 7168),
        norm(8, 2048, 3648, torch.bfloat16, False),
        norm(32, 2048, 3648, torch.bfloat16, False),
        norm(128, 7168, 2112, torch.bfloat16, False),
        norm(64, 4096, 6144, torch.bfloat16, True),
        norm(8, 2048, 3648, torch.float32, False),
        add(1, 2048, 2048),
        add(32, 4096, 4096),
        add(256, 16384, 7168),
    ]
