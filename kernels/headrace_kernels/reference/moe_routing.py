"""`headrace_kernels.moe_routing` in plain torch: its specification."""

from __future__ import annotations

from headrace_kernels.moe_routing import moe_routing_ref as moe_routing

__all__ = ["moe_routing"]
