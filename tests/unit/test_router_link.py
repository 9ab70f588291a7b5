"""The router's connection to one address: it ends when it is told to, whatever happens at the same time."""

import asyncio

from headrace_core.errors import UnavailableError
from headrace_core.testing.async_test import async_test
from headrace_router.fleet.link import Link


class NoFleet:
    router_id = 1

    def judge(self, link, info, layout):
        return ""

    def on_change(self):
        pass

    def on_state(self):
        pass


@async_test
async def test_a_link_that_is_cancelled_as_its_worker_is_lost_ends_and_does_not_connect_again(monkeypatch):
    """A task group that fails while it is cancelled raises the failure, and the cancellation is gone with it."""
    again = asyncio.Event()
    tries: list[None] = []

    async def watch(self, channel, group):
        tries.append(None)
        if len(tries) > 1:
            again.set()
        else:
            group.create_task(lose())
        await asyncio.Event().wait()

    async def lose():
        running.cancel()
        raise UnavailableError("WORKER_LOST", "the worker ended the session")

    monkeypatch.setattr(Link, "_watch_health", watch)
    running = asyncio.ensure_future(Link("127.0.0.1:1", NoFleet()).run())
    connecting = asyncio.ensure_future(again.wait())
    try:
        await asyncio.wait([running, connecting], return_when=asyncio.FIRST_COMPLETED)
        assert running.done(), "it connects again"
        assert running.cancelled()
    finally:
        for task in (running, connecting):
            task.cancel()
        await asyncio.gather(running, connecting, return_exceptions=True)
