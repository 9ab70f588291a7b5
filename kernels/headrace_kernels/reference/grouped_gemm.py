"""`headrace_kernels.grouped_gemm` in plain torch: its specifications."""

from __future__ import annotations

from headrace_kernels.grouped_gemm import (
    combine_assignments_ref as combine_assignments,
)
from headrace_kernels.grouped_gemm import (
    experts_down_ref as experts_down,
)
from headrace_kernels.grouped_gemm import (
    experts_gate_up_ref as experts_gate_up,
)

__all__ = ["combine_assignments", "experts_down", "experts_gate_up"]
