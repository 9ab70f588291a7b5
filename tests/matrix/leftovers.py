"""What a stopped service may have left in its process: tasks, threads, sockets and shared memory."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from pathlib import Path

from headrace_core.testing.async_test import is_grpc_task

_LOOPS_OWN = ("asyncio_", "uvloop")
"""Threads of the loop's executor live as long as the loop."""
_PATIENCE_S = 20.0
"""Sockets are closed by gRPC's own threads, later; after a partition as soon as they find out."""


def look(*, has_sockets: bool = True) -> Counter[str]:
    """Return what there is now, by kind and name; sockets if they are asked for."""
    current = asyncio.current_task()
    tasks = (task for task in asyncio.all_tasks() if task is not current and not is_grpc_task(task))
    found = Counter(f"task {task.get_coro()!r}" for task in tasks)
    threads = (thread.name for thread in threading.enumerate())
    found += Counter(f"thread {name}" for name in threads if not name.startswith(_LOOPS_OWN))
    found += Counter(file for file in _files() if has_sockets or file != "socket")
    found += Counter(f"segment {path.name}" for path in Path("/dev/shm").iterdir() if f"{os.getpid()}" in path.name)
    return found


async def new_since(before: Counter[str], *, has_sockets: bool) -> list[str]:
    """Return what there is that was not there `before`, unless it goes within a moment."""
    gc.collect()  # what only garbage refers to is not left, and connections may hang on to it
    left = look(has_sockets=has_sockets) - before
    deadline = time.monotonic() + _PATIENCE_S
    while left and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
        left = look(has_sockets=has_sockets) - before
    return sorted(left.elements())


def _files() -> list[str]:
    found: list[str] = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # it was closed meanwhile
        # Sockets by kind alone: their numbers differ. Pipes and polls are the loop's and gRPC's, and live as long.
        kind = target.partition(":")[0]
        if kind == "socket" or target.startswith(("/memfd:", "/dev/shm/")):
            found.append("socket" if kind == "socket" else f"segment {target}")
    return found
