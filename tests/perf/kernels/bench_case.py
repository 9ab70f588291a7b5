"""What the kernels' benchmark needs to know of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from headrace_kernels.gpu.configs import Config

Calls = Callable[[], list[Callable[[], object]]]
"""Makes inputs on the GPU and returns calls on different buffers, taken in turn so that the L2 cache does not help."""


@dataclass(frozen=True)
class BenchCase:
    """One kernel at one shape.

    `bytes_moved` and `flops` are what cannot be avoided; the floor is the longer of both at the measured ceilings.
    `ceiling` names the matrix rate that bounds it ("bf16" or "fp8"). `peers` are others' kernels of the same function
    on the same buffers; `eager_peers` are those that wait for the host, which no CUDA graph can hold: they are timed
    call by call. `published_us` is another's figure on an H200, with its source.
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
"""What a family's `tuning()` lists: family, key of `configs.config`, candidates (the default first), a case to time."""


def num_buffers(bytes_of_one: float) -> int:
    """Return how many buffers of that size to take in turn so that no L2 cache holds them: 2 to 64, about 256 MB."""
    return max(2, min(64, round(256e6 / max(bytes_of_one, 1))))
