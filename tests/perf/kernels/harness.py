"""Time calls on a GPU: replays of a CUDA graph, medians. Refuses where there is none."""

from __future__ import annotations

import importlib
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import headrace_kernels
import torch
import triton

_GRAPH_S = 5e-3
_MAX_GRAPH_CALLS = 4096
_REPLAYS = 30
_WARM_UP_REPLAYS = 3
_EAGER_ROUNDS = 5


class NoGpuError(RuntimeError):
    """There is no GPU to measure on."""


def require_gpu() -> str:
    """Return the GPU's name; NoGpuError with what to do if there is none."""
    if not torch.cuda.is_available():
        raise NoGpuError(
            f"torch {torch.__version__} sees no GPU, so nothing was measured and nothing written. Run this on a "
            "machine with a CUDA or ROCm GPU and a torch built for it; `make kernels-aot` needs none."
        )
    return torch.cuda.get_device_name()


def measure_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of one call, µs, over replays of a graph that makes all `calls` in turn, over and over.

    Each call works on its own buffers, so that together they exceed the L2 cache. What a graph cannot do, a call must
    not: no synchronisation, no reading of values. The gap between two kernels of a graph is part of the figure.
    """
    if not calls:
        raise ValueError("nothing to measure: the case makes no calls")
    round_s = _eager_round_s(calls)
    repeats = max(1, min(math.ceil(_GRAPH_S / round_s), _MAX_GRAPH_CALLS // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(_WARM_UP_REPLAYS):
        graph.replay()
    return _median_us(graph.replay, _REPLAYS) / (repeats * len(calls))


def measure_eager_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of one call, µs, made from the host: what it waits for there is part of the figure."""
    if not calls:
        raise ValueError("nothing to measure: the case makes no calls")
    _eager_round_s(calls)

    def make_all() -> None:
        for call in calls:
            call()

    return _median_us(make_all, _EAGER_ROUNDS) / len(calls)


def measure_host_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return how long a round of calls takes where there is no GPU, µs a call: it means nothing but that they run."""
    began_s = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began_s) * 1e6 / len(calls)


def _median_us(run: Callable[[], object], rounds: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def _eager_round_s(calls: Sequence[Callable[[], object]]) -> float:
    """Make every call twice outside a graph, the first time to compile it, and return how long the second took."""
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began_s
    return seconds


def is_usable() -> bool:
    """Say whether this process can go on measuring: some failures of a kernel or of a capture leave it unable to.

    A kernel that faults fails every later call; a capture that fails may leave the random generator in it, and the
    capture's stream the current one.
    """
    try:
        torch.randn(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return torch.cuda.current_stream() == torch.cuda.default_stream()


def family_modules() -> list[str]:
    """Return the modules of the families' benchmarks: those named as an entry of the kernels, in their order."""
    entries = Path(headrace_kernels.__file__).parent
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if (entries / path.name).exists())
    return [f"{__package__}.{name}" for name in names]


def families(attribute: str) -> dict[str, Callable[[], list[Any]]]:
    """Return the function named `attribute` ("cases", "tuning") of every family's benchmark that has one, by family."""
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in family_modules()}
    return {name: getattr(module, attribute) for name, module in modules.items() if hasattr(module, attribute)}


def versions() -> dict[str, str]:
    """Return what a figure depends on beside the GPU."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "driver": _driver(),
        "python": platform.python_version(),
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() or ["unknown"])[0]
