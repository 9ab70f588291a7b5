"""The router's queue: who is bound to which workers and when, what is reserved, and what becomes of who gives up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import grpc.aio
import pytest
from headrace.v1 import types_pb2, worker_service_pb2
from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.testing.async_test import async_test, eventually
from headrace_router import policy
from headrace_router.dispatch import Dispatcher, Placement
from headrace_router.fair_queue import Turn
from headrace_router.policy import MAX_OVERTAKEN, Waiting
from headrace_router.worker import Worker

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
    turn: Turn = field(init=False)

    def __post_init__(self) -> None:
        self.turn = Turn((self.client,), (self.place, next(_ARRIVALS)), 2 * self.num_tokens)

    def waiting(self) -> Waiting:
        return Waiting(self.num_tokens, 2 * self.num_tokens, self.prefix_key, client=self.turn.client)


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

    def __init__(self, channel: grpc.aio.Channel, *, no_workers_timeout_s: float = 60.0) -> None:
        self._channel = channel
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
        worker = Worker(address, info, LAYOUT, self._channel)
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
    async with grpc.aio.insecure_channel("127.0.0.1:9") as channel:
        queue = Queue(channel, **settings)
        try:
            yield queue
        finally:
            for call in queue.calls:
                call.cancel()
            await asyncio.gather(*queue.calls, return_exceptions=True)


async def failure(call: asyncio.Task[Placement]) -> HeadraceError:
    await eventually(call.done, "it is refused")
    with pytest.raises(HeadraceError) as raised:
        await call
    return raised.value


def reserved(worker: Worker) -> tuple[int, int, int]:
    """Return what is promised of a worker of 100 pages and 8 slots: pages, prompt tokens, slots."""
    view = worker.view()
    return 100 - view.num_free_pages, view.num_tokens_in_flight, 8 - view.num_free_slots


@async_test
async def test_a_placement_reserves_pages_tokens_and_a_slot_until_each_is_over():
    async with a_queue() as queue:
        prefill, decode = queue.add_worker("p", "prefill"), queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample(num_tokens=20))
        assert (placement.prefill, placement.decode) == (prefill, decode)
        assert (reserved(prefill), reserved(decode)) == ((2, 20, 1), (3, 0, 1))
        placement.on_prefilled()
        assert (reserved(prefill), reserved(decode)) == ((2, 0, 1), (3, 0, 1))
        placement.on_started()
        assert (reserved(prefill), reserved(decode)) == ((0, 0, 0), (3, 0, 1))
        for _ in range(2):
            placement.release()
            assert (reserved(prefill), reserved(decode)) == ((0, 0, 0), (0, 0, 0))


@async_test
async def test_an_attempt_that_fails_early_gives_both_workers_back():
    async with a_queue() as queue:
        prefill, decode = queue.add_worker("p", "prefill"), queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample())
        placement.release()
        assert (reserved(prefill), reserved(decode)) == ((0, 0, 0), (0, 0, 0))
        assert not prefill.is_busy
        assert not decode.is_busy


@async_test
async def test_a_colocated_placement_reserves_everything_of_one_worker():
    async with a_queue() as queue:
        worker = queue.add_worker("b", "both")
        placement = await queue.placed_now(StubSample(num_tokens=20))
        assert (placement.prefill, placement.decode) == (None, worker)
        assert reserved(worker) == (3, 20, 1)
        placement.on_prefilled()
        assert reserved(worker) == (3, 20, 1)
        placement.on_started()
        assert reserved(worker) == (3, 0, 1)
        placement.release()
        assert reserved(worker) == (0, 0, 0)


@async_test
async def test_what_the_worker_reports_of_a_started_sequence_is_not_reserved_twice():
    async with a_queue() as queue:
        prefill, decode = queue.add_worker("p", "prefill"), queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample(num_tokens=20))
        placement.on_prefilled()
        prefill.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=98))
        assert reserved(prefill)[0] == 2
        placement.on_started()
        decode.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=98))
        assert reserved(decode)[0] == 3, "two pages are in use there, and one more is expected"


@async_test
async def test_samples_start_in_order_of_arrival_and_one_retried_takes_its_old_place():
    async with a_queue() as queue:
        late, early, middle = StubSample(3.0), StubSample(1.0), StubSample(2.0)
        queue.add_worker("p", "prefill")
        decode = queue.add_worker("d", "decode", max_step_sequences=1)
        running = await queue.placed_now(StubSample(0.0))
        for sample in (late, early, middle):
            queue.place(sample)
        for expected in ([early], [early, middle], [early, middle, late]):
            running.release()
            queue.dispatcher.kick()
            await queue.settle()
            assert queue.placed[1:] == expected
            running = queue.calls[[late, early, middle].index(expected[-1]) + 1].result()
        assert decode.is_busy


@async_test
async def test_whatever_happens_in_one_tick_is_planned_once():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode")
        calls = [queue.place(StubSample()) for _ in range(4)]
        for call in calls:
            await queue.result(call)
        assert queue.fleet.num_looks == 1
        queue.dispatcher.kick()
        await queue.settle()
        assert queue.fleet.num_looks == 1, "nobody waits: there is nothing to plan"


@async_test
async def test_a_change_of_the_fleet_starts_who_waited_for_it():
    async with a_queue() as queue:
        call = queue.place(StubSample())
        await queue.settle()
        queue.add_worker("p", "prefill")
        await queue.settle()
        assert not call.done()
        queue.add_worker("d", "decode")
        queue.fleet.on_change()
        assert (await queue.result(call)).decode.address == "d"


@async_test
async def test_a_worker_on_hold_gets_nothing_until_it_reports():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        decode = queue.add_worker("d", "decode")
        decode.hold()
        call = queue.place(StubSample())
        await queue.settle()
        assert not call.done()
        decode.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=100))
        queue.fleet.on_change()
        await queue.result(call)


@async_test
async def test_who_gives_up_while_waiting_leaves_the_queue():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode", max_step_sequences=1)
        running = await queue.placed_now(StubSample(0.0))
        gone, next_one = queue.place(StubSample(1.0)), queue.place(StubSample(2.0))
        await queue.settle()
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        running.release()
        queue.dispatcher.kick()
        await queue.result(next_one)
        assert len(queue.placed) == 2


@async_test
async def test_who_gives_up_as_it_is_placed_gives_its_workers_to_the_next():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        decode = queue.add_worker("d", "decode", max_step_sequences=1)
        first, second = queue.place(StubSample(1.0)), queue.place(StubSample(2.0))
        await asyncio.sleep(0)  # both wait, and a round is due
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: first.cancel() if decode.is_busy else None)
        await queue.result(second)
        assert first.cancelled()
        assert decode.view().num_free_slots == 0
        second.result().release()
        assert not decode.is_busy


@async_test
async def test_a_sequence_is_overtaken_only_so_often():
    """The large prompt waits for the loaded prefill worker; small ones go past it to the other, while they may."""
    async with a_queue() as queue:
        loaded = queue.add_worker("loaded", "prefill", max_step_tokens=50)
        other = queue.add_worker("other", "prefill", max_step_tokens=4)
        queue.add_worker("d", "decode", max_step_sequences=10_000)
        loaded.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=100, num_waiting_tokens=1))
        other.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=100, num_waiting_tokens=1))
        large = queue.place(StubSample(0.0, num_tokens=120))
        await queue.settle()
        for number in range(1, MAX_OVERTAKEN + 5):
            small = queue.place(StubSample(float(number), num_tokens=1))
            await queue.settle()
            if not small.done():
                break
            small.result().release()
        assert not large.done()
        assert number == MAX_OVERTAKEN + 1
        loaded.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=100))
        queue.fleet.on_change()
        assert (await queue.result(large)).prefill is loaded


@async_test
async def test_a_sequence_that_no_pool_can_ever_hold_is_refused_at_once():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill", num_pages=1000)
        queue.add_worker("d1", "decode", num_pages=10)
        queue.add_worker("d2", "decode", num_pages=20)
        error = await failure(queue.place(StubSample(num_tokens=20 * PAGE)))
        assert isinstance(error, OverloadedError)
        assert error.reason == "NO_FREE_PAGES"
        assert (await queue.placed_now(StubSample(num_tokens=20 * PAGE - 1))).decode.address == "d2"


@async_test
async def test_without_workers_a_sample_waits_for_so_long_and_is_told_what_is_missing():
    async with a_queue(no_workers_timeout_s=0.0) as queue:
        queue.fleet.lack = "no decode worker is ready"
        queue.add_worker("p", "prefill")
        error = await failure(queue.place(StubSample()))
        assert isinstance(error, UnavailableError)
        assert (error.reason, str(error)) == ("NO_WORKERS", "no decode worker is ready")
        assert (await failure(queue.place(StubSample()))).reason == "NO_WORKERS", "and so is the next one"


@async_test
async def test_a_sample_waits_for_a_busy_fleet_however_long():
    async with a_queue(no_workers_timeout_s=0.0) as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode", max_step_sequences=1)
        running = await queue.placed_now(StubSample())
        call = queue.place(StubSample())
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await eventually(lambda: loop.time() - begun_s > 0.6, "two checks have passed")
        assert not call.done()
        running.release()
        queue.dispatcher.kick()
        await queue.result(call)


@async_test
async def test_a_worker_that_comes_in_time_is_waited_for():
    async with a_queue(no_workers_timeout_s=30.0) as queue:
        queue.fleet.lack = "no worker is ready"
        call = queue.place(StubSample())
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await eventually(lambda: loop.time() - begun_s > 0.3, "a check has passed")
        assert not call.done()
        queue.add_worker("b", "both")
        queue.fleet.lack = ""
        queue.fleet.on_change()
        await queue.result(call)


@async_test
async def test_a_round_looks_no_further_than_something_free_could_hold(monkeypatch):
    """One client's thousand prompts for the one worker that could hold them cost a round no more than one."""
    looked = []

    def watch(queue, *args, **settings):
        return plan((looked.append(waiting) or waiting for waiting in queue), *args, **settings)

    plan = policy.plan
    monkeypatch.setattr(policy, "plan", watch)
    async with a_queue() as queue:
        large = queue.add_worker("large", "prefill", num_pages=1000, max_step_tokens=300)
        queue.add_worker("small", "prefill", num_pages=10)
        queue.add_worker("d", "decode", num_pages=10_000)
        large.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=1000, num_waiting_tokens=600))
        calls = [queue.place(StubSample(float(i), num_tokens=400 + i)) for i in range(1000)]
        await queue.settle()
        looked.clear()
        queue.dispatcher.kick()
        await queue.settle()
        assert len(looked) == 2
        await queue.placed_now(StubSample(2000.0, num_tokens=20))
        large.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=1000))
        queue.fleet.on_change()
        assert (await queue.result(calls[0])).prefill is large
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert not queue.dispatcher._kinds
