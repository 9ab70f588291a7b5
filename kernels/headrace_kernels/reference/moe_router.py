"""`headrace_kernels.moe_router` in plain torch: its specification, whose four steps are families themselves."""

from __future__ import annotations

from headrace_kernels.moe_router import route_and_sort_ref as route_and_sort

__all__ = ["route_and_sort"]
