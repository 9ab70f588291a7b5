"""Calls of `causal_attention` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import causal_attention as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Heads of DeepSeek (192 and 128), of Mixtral, and float32."""

    def case(heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype) -> AotCase:
        query = torch.empty((4096, heads[0], widths[0]), dtype=dtype, device="meta")
        key, value = (torch.empty((8192, heads[1], w), dtype=dtype, device="meta") for w in widths)
        starts = torch.tensor([[0, 1024, 4096], [0, 4096, 8192]], dtype=torch.int32)
        name = f"causal_attention H={heads[0]} G={heads[1]} {widths[0]}/{widths[1]} {str(dtype).removeprefix('torch.')}"
        run = lambda: family.causal_attention(query, key, value, *starts, scale=0.1)  # noqa: E731
        return AotCase(name, run, uses_matrix_units=dtype == torch.bfloat16)

    bf16, fp32 = torch.bfloat16, torch.float32
    return [case((16, 16), (192, 128), bf16), case((32, 8), (128, 128), bf16), case((16, 16), (192, 128), fp32)]
