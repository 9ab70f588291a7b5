"""Measure the CPU this runs on: what it reads, copies and multiplies per second, with all its cores.

Three quick measurements, best of several: where others use the machine too, the best is the nearest to what it can do.
NumPy multiplies in FP32. An engine that uses AMX multiplies BF16 several times faster: give its peak in a file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype


def measure_cpu(*, repeats: int = 5, bytes_per_core: int = 256 << 20, matrix_size: int = 1536) -> Hardware:
    """Return this machine's CPU as hardware named "cpu"; takes about two seconds.

    `bytes_per_core`, taken twice, should exceed a core's part of the last-level cache: it is memory that is measured.
    """
    cores = len(os.sched_getaffinity(0))
    sources = [np.ones(bytes_per_core // 4, dtype=np.float32) for _ in range(cores)]
    targets = [np.empty_like(source) for source in sources]
    total = cores * bytes_per_core
    with ThreadPoolExecutor(cores) as pool:
        read_s = best_of(lambda: list(pool.map(np.max, sources)), repeats)
        copy_s = best_of(lambda: list(pool.map(np.copyto, targets, sources)), repeats)
    matrix = np.ones((matrix_size, matrix_size), dtype=np.float32)
    matmul_s = best_of(lambda: matrix @ matrix, repeats)
    return cpu_hardware(
        {Dtype.FP32: 2 * matrix_size**3 / matmul_s},
        memory_bytes_per_s=total / read_s,
        copy_bytes_per_s=total / copy_s,
        source=f"measured here, {cores} cores: FP32 matrix product, reading memory; link and network as a memory copy",
    )


def cpu_hardware(
    flops: Mapping[Dtype, float], *, memory_bytes_per_s: float, copy_bytes_per_s: float, source: str,
    operation_overhead_s: float = 0.0,
) -> Hardware:  # fmt: skip
    """Return hardware named "cpu" with what was measured and this machine's memory."""
    return Hardware(
        name="cpu",
        flops=flops,
        memory_bytes_per_s=memory_bytes_per_s,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        link_bytes_per_s=copy_bytes_per_s,
        network_bytes_per_s=copy_bytes_per_s,
        cost_per_hour=0.0,
        source=source,
        operation_overhead_s=operation_overhead_s,
    )


def read_bytes_per_s(num_bytes: int, *, num_threads: int, repeats: int) -> float:
    """Return how fast so many threads read `num_bytes` again and again: from the cache, if they fit in it."""
    sources = [np.ones(num_bytes // num_threads // 4, dtype=np.float32) for _ in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        return num_bytes / best_of(lambda: list(pool.map(np.max, sources)), repeats)


def best_of(measured: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest of `repeats` calls, after one that is not counted."""
    measured()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        measured()
        best = min(best, time.perf_counter() - start)
    return best
