"""What the tests of the dispatcher share: a queue of stub samples before a stub fleet."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
from headrace.v1 import types_pb2, worker_service_pb2
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.testing.async_test import eventually
from headrace_router.fleet.worker import Worker
from headrace_router.placement.fair_queue import Turn
from headrace_router.placement.policy import Waiting
from headrace_router.requests.dispatch import Dispatcher, Placement

PAGE = 16


_ARRIVALS = itertools.count()


LAYOUT = KvLayout(2, PAGE, CacheDtype.BFLOAT16, LatentAttention(512, 64))


ROLES = {
    "prefill": types_pb2.WORKER_ROLE_PREFILL,
    "decode": types_pb2.WORKER_ROLE_DECODE,
    "both": types_pb2.WORKER_ROLE_BOTH,
}


@dataclass(eq=False)
class StubSample:
    """A sample of `num_tokens` prompt tokens that expects as many of output."""

    place: float = 0.0
    num_tokens: int = 16
    prefix_key: int = 1
    client: str = "one"
    due_s: float = math.inf
    itl_s: float = math.inf
    turn: Turn = field(init=False)

    def __post_init__(self) -> None:
        self.turn = Turn((self.client,), (self.place, next(_ARRIVALS)), 2 * self.num_tokens)

    def waiting(self) -> Waiting:
        return Waiting(
            self.num_tokens, 2 * self.num_tokens, self.prefix_key, client=self.turn.client, most_step_s=self.itl_s
        )


@dataclass
class StubFleet:
    """A registry of these workers."""

    fleet: list[Worker] = field(default_factory=list)
    lack: str = ""
    listeners: list = field(default_factory=list)
    num_looks: int = 0

    def workers(self) -> list[Worker]:
        self.num_looks += 1
        return [worker for worker in self.fleet if worker.takes_work]

    def ready(self) -> list[Worker]:
        return self.fleet

    def missing(self) -> str:
        return self.lack

    def on_change(self) -> None:
        for listener in self.listeners:
            listener()


class Queue:
    """A dispatcher over a stub fleet, and what it has placed so far, in order."""

    def __init__(self, *, no_workers_timeout_s: float = 60.0) -> None:
        self.fleet = StubFleet()
        self.dispatcher = Dispatcher(self.fleet, no_workers_timeout_s=no_workers_timeout_s)
        self.placed: list[StubSample] = []
        self.calls: list[asyncio.Task[Placement]] = []

    def add_worker(
        self, address: str, role: str, *, num_pages=100, max_step_tokens=256, max_step_sequences=8
    ) -> Worker:
        info = worker_service_pb2.GetInfoResponse(
            role=ROLES[role],
            num_pages=num_pages,
            vocab_size=100,
            max_context_tokens=100_000,
            max_step_tokens=max_step_tokens,
            max_step_sequences=max_step_sequences,
        )
        worker = Worker(address, info, LAYOUT, 1)
        worker.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=num_pages))
        self.fleet.fleet.append(worker)
        return worker

    def place(self, sample: StubSample) -> asyncio.Task[Placement]:
        async def call() -> Placement:
            placement = await self.dispatcher.place(sample)
            self.placed.append(sample)
            return placement

        self.calls.append(asyncio.ensure_future(call()))
        return self.calls[-1]

    async def placed_now(self, sample: StubSample) -> Placement:
        """Place a sample for which there is room."""
        return await self.result(self.place(sample))

    async def result(self, call: asyncio.Task[Placement]) -> Placement:
        """Return what is due: waiting for it would be waiting for ever if it is not."""
        await self.settle()
        assert call.done(), "it still waits"
        return call.result()

    async def settle(self) -> None:
        """Let everything that is due happen: rounds, and who waited for them."""
        for _ in range(10):
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def a_queue(**settings) -> AsyncGenerator[Queue]:
    """Fail if a round did: the loop would only log that."""
    faults: list[dict] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    queue = Queue(**settings)
    try:
        yield queue
    finally:
        for call in queue.calls:
            call.cancel()
        await asyncio.gather(*queue.calls, return_exceptions=True)
    assert not faults, faults


async def failure(call: asyncio.Task[Placement]) -> HeadraceError:
    await eventually(call.done, "it is refused")
    with pytest.raises(HeadraceError) as raised:
        await call
    return raised.value


def reserved(worker: Worker) -> tuple[int, int, int]:
    """Return what is promised of a worker of 100 pages and 8 slots: pages, prompt tokens, slots."""
    view = worker.view(0.0)
    return 100 - view.num_free_pages, view.num_tokens_in_flight, 8 - view.num_free_slots
