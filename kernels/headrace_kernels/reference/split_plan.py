"""`headrace_kernels.split_plan` in plain torch: its specification."""

from __future__ import annotations

from headrace_kernels.split_plan import plan_splits_ref as plan_splits

__all__ = ["plan_splits"]
