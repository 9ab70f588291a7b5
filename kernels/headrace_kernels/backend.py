"""Which backend a kernel runs on: Triton on a GPU, compiled or plain torch on a CPU.

    reference   plain torch, anywhere: what every other backend must equal
    cpu         compiled for a CPU; where its library is
    triton      Triton kernels, for a GPU
    aiter       AMD's kernels (ROCm/aiter), for its GPUs; where that package is

`dispatch` says which families have kernels on which backend. A backend's modules are imported only where they run: a
worker on a CPU neither needs Triton nor pays for its import.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

Backend = Literal["reference", "cpu", "triton", "aiter"]

_CPU_LIBRARY = "headrace_kernels.cpu.library"
_CPU_AGREEMENT = "headrace_kernels.cpu.agreement"

_forced: ContextVar[Backend | None] = ContextVar("forced_backend", default=None)
_chosen: Backend | None = None


def backend(tensor: Tensor) -> Backend:
    """Return what a kernel called with `tensor` runs on, if its family has a kernel there (`dispatch.backend_of`).

    What `use_backend` forces, or `choose_backend` chose where the tensor's device can have it; else "triton" for a
    GPU's memory, "cpu" for the host's where the compiled library is there, "reference" for all other.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    if _chosen == "reference":
        return "reference"
    if tensor.is_cuda:
        return "aiter" if _chosen == "aiter" else "triton"
    return "cpu" if tensor.is_cpu and cpu_problem() is None else "reference"


@contextmanager
def use_backend(name: Backend) -> Generator[None]:
    """Let every kernel that this thread calls run on `name`, whatever its tensors are on.

    "triton" with tensors on the CPU needs Triton's interpreter (TRITON_INTERPRET=1); "reference" works anywhere.

    Raises:
        ValueError: `name` is not to be had here.
    """
    missing = what_is_missing(name)
    if missing:
        raise ValueError(f"kernels can't run on {name!r}: {missing}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_backend(name: Backend | None) -> None:
    """Let the kernels of all threads run on `name` where their tensors' device can have it; None: on the best there is.

    A process' setting, made once when it starts; `use_backend` goes before it.

    Raises:
        ValueError: `name` is not to be had here.
    """
    global _chosen
    missing = name and what_is_missing(name)
    if missing:
        raise ValueError(f"kernels can't run on {name!r}: {missing}")
    _chosen = name


def what_is_missing(name: Backend) -> str | None:
    """Return what `name` lacks in this installation, whatever the device; None: nothing."""
    if name == "cpu":
        return cpu_problem()
    if name in ("triton", "aiter") and find_spec(name) is None:
        return f"the package {name} is not installed"
    return None


# Asked at every call of a kernel.
@cache
def cpu_problem() -> str | None:
    """Return why the compiled CPU kernels can't run here; None: their library is there, for this processor."""
    problem: str | None = import_module(_CPU_LIBRARY).problem()
    if problem is None:
        import_module(_CPU_AGREEMENT).settle()
    return problem


def instruction_set() -> str:
    """Return what compiled CPU kernels run on, such as "avx2"; "" where they can't run."""
    return str(import_module(_CPU_LIBRARY).isa())
