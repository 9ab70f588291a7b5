"""Calls of `rope` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import rope as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """The queries of DeepSeek-V3, a slice of a wider tensor, in both orders; the heads of Mixtral; a lone key."""

    def case(name: str, num_heads: int, head_dim: int, width: int, is_interleaved: bool) -> AotCase:
        heads = torch.empty((64, num_heads, head_dim), dtype=torch.bfloat16, device="meta")
        angles = torch.empty((64, width // 2), device="meta")
        x = heads[..., head_dim - width :]
        return AotCase(f"rope {name} bf16", lambda: family.rope(x, angles, angles, is_interleaved=is_interleaved))

    return [
        case("interleaved 128x64", 128, 192, 64, True),
        case("by halves 128x64", 128, 192, 64, False),
        case("by halves 40x128", 40, 128, 128, False),
        case("interleaved 1x64", 1, 64, 64, True),
    ]
