"""Calls of `sampling` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import sampling as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.draws import Draws


def aot_cases() -> list[AotCase]:
    """DeepSeek-V3's vocabulary."""
    logits = torch.empty((128, 129_280), dtype=torch.float32, device="meta")
    real, whole = (torch.empty((128,), dtype=dtype, device="meta") for dtype in (torch.float64, torch.int64))
    draws = Draws(real, whole, real, real, whole, whole, whole)
    return [AotCase("sample_tokens V=129280", lambda: family.sample_tokens(logits, draws))]
