"""`headrace_kernels.rope` in plain torch: its specification."""

from __future__ import annotations

from headrace_kernels.rope import rope_ref as rope

__all__ = ["rope"]
