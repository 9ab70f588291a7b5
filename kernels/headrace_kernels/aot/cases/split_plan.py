"""Calls of `split_plan` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import split_plan as family
from headrace_kernels.aot.case import AotCase


def aot_cases() -> list[AotCase]:
    """A batch of decode rows on pages of 64 tokens."""

    def case(num_rows: int) -> AotCase:
        context_lens = torch.empty(num_rows, dtype=torch.int32, device="meta")
        return AotCase(f"split_plan {num_rows}", lambda: family.plan_splits(context_lens, 64, num_programs=132))

    return [case(1), case(300)]
