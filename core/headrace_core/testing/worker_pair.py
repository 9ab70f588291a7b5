"""Worker services inside a test: started, and on the way out every page free and the process' books in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from headrace_core.kv.page_pool import PageState
from headrace_core.testing.async_test import WAIT_S, eventually


@contextlib.asynccontextmanager
async def running(*services: Any) -> AsyncGenerator[tuple[str, ...]]:
    """Start worker services and yield their addresses; afterwards check that nothing leaked, and stop them."""
    addresses = tuple([await service.start() for service in services])
    try:
        yield addresses
        for service in services:
            await all_free(service)
            await service.drain()
    finally:
        for service in services:
            _release(service)
            await service.stop()


async def all_free(service: Any) -> None:
    """Return when no sequence holds a page of the worker; fail if that does not come, or if its books are wrong."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while True:
        await _idle(service)
        counts = await inspect(service)
        if not counts[PageState.OWNED] and not counts[PageState.QUARANTINED]:
            return
        # Something began since the report, and is waited for as well; or nobody will free them.
        assert loop.time() < deadline, f"pages are still held: {counts}"
        await asyncio.sleep(0.001)


async def _idle(service: Any) -> None:
    with contextlib.suppress(AssertionError):
        await eventually(lambda: _is_idle(service), "every page is free")
    report = service.host.board.report
    assert _is_idle(service), (
        f"{service.host.model.num_pages} pages, {report.num_free_pages} free; {report.num_running} sequences run, "
        f"{report.num_waiting} wait, {report.num_leases} leases; by state {await inspect(service)}"
    )


async def inspect(service: Any) -> dict[PageState, int]:
    """Check the scheduler's integrity on the engine thread; return pages by state."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[dict[PageState, int]] = loop.create_future()

    def look(scheduler: Any) -> None:
        try:
            scheduler.check_integrity()
            loop.call_soon_threadsafe(done.set_result, scheduler.load().page_counts)
        except AssertionError as error:
            loop.call_soon_threadsafe(done.set_exception, error)

    service.host.engine.submit(look)
    async with asyncio.timeout(WAIT_S):
        return await done


def _release(service: Any) -> None:
    """Let a fake model's step go on that a failed test held: the engine's thread is waited for."""
    release = getattr(service.host.model.model, "release", None)
    if release:
        release()


def _is_idle(service: Any) -> bool:
    report = service.host.board.report
    is_quiet = not report.num_running and not report.num_waiting and not report.num_leases
    return is_quiet and report.num_free_pages == service.host.model.num_pages
