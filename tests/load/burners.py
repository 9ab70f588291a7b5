"""Keeps cores busy with nothing, for what must hold on a machine that has no time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Generator
from contextlib import contextmanager

_PERIOD_S = 0.01


@contextmanager
def burning(count: int, *, share: float = 1.0) -> Generator[None]:
    """Run so many processes that compute as fast as they can, each for `share` of a core's time if it gets that."""
    # Not forked: this process may have threads.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_burn, args=(share,), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _burn(share: float) -> None:
    while share >= 1.0:
        pass
    while True:
        # Its own time, not the clock's: who has to wait for the core catches up.
        until_s = time.process_time() + share * _PERIOD_S
        while time.process_time() < until_s:
            pass
        time.sleep((1.0 - share) * _PERIOD_S)
