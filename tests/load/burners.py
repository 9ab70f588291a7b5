"""Keeps cores busy with nothing, for what must hold on a machine that has no time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def burning(count: int) -> Generator[None]:
    """Run so many processes that compute as fast as they can."""
    # Not forked: this process may have threads.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _burn() -> None:
    while True:
        pass
