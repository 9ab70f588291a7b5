"""Kernels: one family a file. Each `f` has a specification in plain torch, `f_ref`, that any faster `f` must equal.

`backend(tensor)` says what kernels run on, `dispatch` which module computes `f` there: in `reference` its
specification, or a torch formulation of it that is faster on a CPU; in `gpu` the launcher of the same name. A family's
tests compare them. This package knows torch and Triton and nothing of Headrace.
"""

from __future__ import annotations

from headrace_kernels.backend import Backend, backend, choose_backend, use_backend

__all__ = ["Backend", "backend", "choose_backend", "use_backend"]
