"""Kernels: one family a file. Each `f` has a specification in plain torch, `f_ref`, that any faster `f` must equal.

`backend(tensor)` says what `f` runs on. On "reference" `f` is its specification, or a torch formulation of it that is
faster on a CPU; on "triton" it is the launcher of the same name in `headrace_kernels.gpu`. A family's tests compare
them. This package knows torch and Triton and nothing of Headrace.
"""

from __future__ import annotations

from headrace_kernels.backend import Backend, backend, use_backend

__all__ = ["Backend", "backend", "use_backend"]
