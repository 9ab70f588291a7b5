"""Calls of `decode_linear` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import decode_linear as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Projections of DeepSeek-V2-Lite, DeepSeek-V3 and Mixtral, for each number of tokens a program can take."""

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

    return [
        norm(8, 2048, 3648, torch.bfloat16, False),
        norm(32, 2048, 3648, torch.bfloat16, False),
        norm(128, 7168, 2112, torch.bfloat16, False),
        norm(64, 4096, 6144, torch.bfloat16, True),
        norm(8, 2048, 3648, torch.float32, False),
        add(1, 2048, 2048),
        add(32, 4096, 4096),
        add(256, 16384, 7168),
    ]
