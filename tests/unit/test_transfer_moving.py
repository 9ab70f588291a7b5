"""A run's move ends when no byte of it can land any more: a transport that can't say so loses its connection."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from headrace.v1 import types_pb2
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.handoff_parts import INCARNATION, PlainMemory, run_of
from headrace_core.transfer.moving import Mover
from headrace_core.transfer.transport import Reading, Source

SOURCE = Source("10.0.0.7:5000", Reading("lease-1", INCARNATION, b""), types_pb2.TransportOffer())
PAGES = (5, 0)


class Stuck:
    """A transport whose one transfer has brought every byte, and is drained by nothing but `disconnect`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.is_torn_down = asyncio.Event()

    def pull(self, *pulled: Any, timeout_s: float) -> Stuck:
        self.calls.append((*pulled, timeout_s))
        return self

    @property
    def is_drained(self) -> bool:
        return False

    async def wait(self) -> None:
        pass

    def cancel(self) -> None:
        self.calls.append("cancel")

    async def drained(self) -> None:
        await self.is_torn_down.wait()

    async def disconnect(self, endpoint: str) -> None:
        self.calls.append(endpoint)
        self.is_torn_down.set()


@pytest.mark.parametrize("is_drained", [True, False])
@async_test
async def test_a_transfer_that_does_not_drain_in_time_loses_its_connection_which_the_log_says(is_drained, caplog):
    memory = PlainMemory()
    run = run_of(memory, PAGES)
    transport: Any = Stuck()
    if is_drained:
        transport.is_torn_down.set()
    with ThreadPoolExecutor(1) as verifying:
        mover = Mover(memory, verifying, timeout_s=7.0, drain_timeout_s=WAIT_S if is_drained else 0.01)
        await mover.move(transport, SOURCE, run, PAGES)
    torn_down = [] if is_drained else [SOURCE.endpoint]
    assert transport.calls == [(SOURCE, run, PAGES, 7.0), "cancel", *torn_down]
    assert [(record.message, record.holder) for record in caplog.records] == [
        ("transfer did not drain, disconnecting", holder) for holder in torn_down
    ]
    assert memory.copies == [("from_host", PAGES, range(2))]


class Drained(Stuck):
    """One that says by itself that no byte can land any more, and would never come out of being asked."""

    @property
    def is_drained(self) -> bool:
        return True


@async_test
async def test_a_transfer_that_is_known_to_be_drained_is_neither_stopped_nor_waited_for():
    memory = PlainMemory()
    run = run_of(memory, PAGES)
    transport: Any = Drained()
    with ThreadPoolExecutor(1) as verifying:
        await Mover(memory, verifying, timeout_s=7.0, drain_timeout_s=WAIT_S).move(transport, SOURCE, run, PAGES)
    assert transport.calls == [(SOURCE, run, PAGES, 7.0)]
    assert memory.copies == [("from_host", PAGES, range(2))]
