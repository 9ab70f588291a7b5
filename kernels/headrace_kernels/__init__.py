"""Kernels: one family a file. Each `f` has a specification in plain torch, `f_ref`, that any faster `f` must equal.

`backend()` says what `f` runs on. On "reference" `f` is its specification, or a torch formulation of it that is
faster on a CPU; a family's tests compare the two. This package knows torch and nothing of Headrace.
"""

from __future__ import annotations

from headrace_kernels.backend import Backend, backend

__all__ = ["Backend", "backend"]
