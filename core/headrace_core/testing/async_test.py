"""Asynchronous tests without a plugin: `@async_test` runs one on a loop of its own and fails it if tasks are left."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")

_TIMEOUT_S = 30.0


def async_test(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Return `test` as a plain function; it has 30 s, and must leave no task behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(_bounded(test(*args, **kwargs)))

    return run


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Return as soon as `condition` holds; fail with `what` if it does not within `timeout_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition():
        assert loop.time() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.001)


async def _bounded(test: Coroutine[Any, Any, None]) -> None:
    before = asyncio.all_tasks()
    async with asyncio.timeout(_TIMEOUT_S):
        await test
        ours = before | {asyncio.current_task()}
        await eventually(lambda: all(_is_grpc(task) for task in asyncio.all_tasks() - ours), "every task has ended", 2)


def _is_grpc(task: asyncio.Task[Any] | None) -> bool:
    """Return whether the task is grpc's own housekeeping, which ends with the loop."""
    return task is not None and "grpc" in repr(task.get_coro())
