"""What the kernels' benchmark needs to know of a case."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from headrace_kernels.gpu.configs import Config

Calls = Callable[[], list[Callable[[], object]]]
"""Makes inputs on the GPU and returns calls on different buffers, taken in turn so that the L2 cache does not help."""


@dataclass(frozen=True)
class BenchCase:
    """One kernel at one shape.

    `bytes_moved` and `flops` are what cannot be avoided; the floor is the longer of both at the measured ceilings.
    `ceiling` names the rate that bounds it: "bf16" or "fp8" of matrix units, "fp32" without. `peers` are others'
    kernels of the same function on the same buffers; `eager_peers` are those that wait for the host, which no CUDA
    graph can hold: they are timed call by call. `published_us` is another's figure on an H200, with its source.
    """

    family: str
    shape: str
    calls: Calls
    bytes_moved: float
    flops: float = 0.0
    ceiling: str = "bf16"
    peers: dict[str, Calls] = field(default_factory=dict)
    eager_peers: dict[str, Calls] = field(default_factory=dict)
    published_us: float | None = None
    published_source: str = ""


TuningCase = tuple[str, str, list[Config], BenchCase]
"""What `tuning()` lists: family, key of `configs.config`, candidates beside the launcher's default, a case to time."""

# Beyond it making the calls takes longer than measuring them, and what is so small is bound by its launch.
_MOST_BUFFERS = 1024
_most_buffers: ContextVar[int] = ContextVar("most_buffers", default=_MOST_BUFFERS)


def num_buffers(bytes_of_one: float) -> int:
    """Return how many buffers of that size to take in turn so that no L2 cache holds them: about 256 MB, or 1024."""
    return min(max(2, round(256e6 / max(bytes_of_one, 1))), _most_buffers.get())


@contextmanager
def buffers_at_most(count: int) -> Generator[None]:
    """Let cases make no more buffers than `count`, where nothing is measured."""
    token = _most_buffers.set(count)
    try:
        yield
    finally:
        _most_buffers.reset(token)
