"""Calls of `rms_norm` whose launches must compile for every target."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels import rms_norm as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """Hidden sizes of DeepSeek-V2-Lite, Mixtral and DeepSeek-V3, and the latent norms."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def alone(width: int) -> AotCase:
        return AotCase(f"rms_norm {width} bf16", lambda: family.rms_norm(meta(64, width), meta(width), 1e-6))

    def added(width: int) -> AotCase:
        rows = meta(64, width)
        return AotCase(f"add_rms_norm {width} bf16", lambda: family.add_rms_norm(rows, rows, meta(width), 1e-6))

    return [alone(width) for width in (512, 1536)] + [added(width) for width in (2048, 4096, 7168)]
