"""Asynchronous tests without a plugin: `@async_test` runs one on a loop of its own and fails it if tasks are left."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")

WAIT_S = 120.0
"""How long tests wait for what must come, seconds. On a machine whose cores are busy everything comes late; only what
hangs takes so long, so no test waits less."""

_TEST_LIMIT_S = 4 * WAIT_S


def async_test(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Return `test` as a plain function; it must end, and leave no task behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(_bounded(test(*args, **kwargs)))

    return run


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds; fail with `what` if it does not within `WAIT_S`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while not condition():
        assert loop.time() < deadline, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.001)


async def _bounded(test: Coroutine[Any, Any, None]) -> None:
    before = asyncio.all_tasks()
    async with asyncio.timeout(_TEST_LIMIT_S):
        await test
        ours = before | {asyncio.current_task()}
        await eventually(lambda: all(is_grpc_task(task) for task in asyncio.all_tasks() - ours), "every task has ended")


def is_grpc_task(task: asyncio.Task[Any] | None) -> bool:
    """Return whether the task is grpc's own housekeeping, which ends with the loop."""
    if task is None:
        return False
    coro: Any = task.get_coro()
    # Some of its coroutines, compiled ones, name themselves in their code alone.
    return "grpc" in repr(coro) or "grpc" in getattr(getattr(coro, "cr_code", None), "co_filename", "")
