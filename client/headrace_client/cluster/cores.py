"""How many cores a process of this machine may use."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def available_cores() -> int:
    """Return how many cores this process may use: its affinity, or less where a container's quota is lower."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)
