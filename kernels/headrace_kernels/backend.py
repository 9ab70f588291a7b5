"""Which implementation a kernel runs on: Triton on a GPU, plain torch elsewhere.

Triton is imported only where it runs: a worker on a CPU neither needs it nor pays for its import.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

Backend = Literal["triton", "reference"]

_forced: ContextVar[Backend | None] = ContextVar("forced_backend", default=None)


def backend(tensor: Tensor) -> Backend:
    """Return what a kernel called with `tensor` runs on: "triton" for a GPU's memory, else "reference", plain torch."""
    return _forced.get() or ("triton" if tensor.is_cuda else "reference")


@contextmanager
def use_backend(name: Backend) -> Generator[None]:
    """Let every kernel that this thread calls run on `name`, whatever its tensors are on.

    "triton" with tensors on the CPU needs Triton's interpreter (TRITON_INTERPRET=1); "reference" works anywhere.
    """
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
