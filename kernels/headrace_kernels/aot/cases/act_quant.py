"""Calls of `act_quant` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import act_quant as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """The hidden size of DeepSeek-V3."""
    x = torch.empty((64, 7168), dtype=torch.bfloat16, device="meta")
    return [AotCase("act_quant 7168 bf16", lambda: family.act_quant(x))]
