"""The router's queue: who is bound to which workers and when, what is reserved, and what becomes of who gives up."""

from __future__ import annotations

import asyncio

from headrace.v1 import worker_service_pb2
from headrace_core.errors import OverloadedError, UnavailableError
from headrace_core.testing.async_test import async_test, eventually
from headrace_router.fleet.session import LastTransfer
from headrace_router.placement import book, policy
from headrace_router.placement.policy import MAX_OVERTAKEN

from tests.unit.router_dispatch_parts import PAGE, StubSample, a_queue, failure, reserved


@async_test
async def test_a_placement_reserves_pages_tokens_and_a_slot_until_each_is_over():
    async with a_queue() as queue:
        prefill, decode = queue.add_worker("p", "prefill"), queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample(num_tokens=20))
        assert (placement.prefill, placement.decode) == (prefill, decode)
        assert (reserved(prefill), reserved(decode)) == ((2, 20, 1), (3, 0, 1))
        placement.on_prefilled(16)
        assert (reserved(prefill), reserved(decode)) == ((2, 0, 1), (3, 0, 1))
        placement.on_joined(None)
        assert (reserved(prefill), reserved(decode)) == ((0, 0, 0), (3, 0, 1))
        for _ in range(2):
            placement.release()
            assert (reserved(prefill), reserved(decode)) == ((0, 0, 0), (0, 0, 0))


@async_test
async def test_how_the_last_pages_came_stands_until_others_come():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        decode = queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample())
        assert decode.last_transfer is None
        for transfer, last in (
            (LastTransfer("shm", 7), LastTransfer("shm", 7)),
            (None, LastTransfer("shm", 7)),
            (LastTransfer("grpc", 5),) * 2,
        ):
            placement.on_joined(transfer)
            assert decode.last_transfer == last


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
        placement.on_prefilled(16)
        assert reserved(worker) == (3, 20, 1)
        placement.on_joined(None)
        assert reserved(worker) == (3, 20, 1), "it computes the prompt now"
        placement.on_stepped(20)
        assert reserved(worker) == (3, 0, 1)
        placement.release()
        assert reserved(worker) == (0, 0, 0)


@async_test
async def test_what_the_worker_reports_of_a_started_sequence_is_not_reserved_twice():
    async with a_queue() as queue:
        prefill, decode = queue.add_worker("p", "prefill"), queue.add_worker("d", "decode")
        placement = await queue.placed_now(StubSample(num_tokens=20))
        placement.on_prefilled(16)
        prefill.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=98))
        assert reserved(prefill)[0] == 2
        placement.on_joined(None)
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
        assert decode.view(0.0).num_free_slots == 0
        second.result().release()
        assert not decode.is_busy


@async_test
async def test_who_gives_up_as_it_is_refused_has_given_up():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode", num_pages=10)
        call = queue.place(StubSample(num_tokens=10 * PAGE))
        await asyncio.sleep(0)  # it waits, and a round is due that refuses it
        asyncio.get_running_loop().call_soon(call.cancel)
        await queue.settle()
        assert call.cancelled()


@async_test
async def test_what_starts_is_counted_to_its_client_and_what_gives_up_is_not():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode", max_step_sequences=1)
        running = await queue.placed_now(StubSample(client="z"))
        samples = [StubSample(client=client) for client in "aaabb"]
        calls = [queue.place(sample) for sample in samples]
        await queue.settle()
        calls[0].cancel()
        for expected in (1, 3, 2, 4):
            await queue.settle()
            running.release()
            running = await queue.result(calls[expected])
        assert queue.placed[1:] == [samples[i] for i in (1, 3, 2, 4)]


@async_test
async def test_a_round_is_told_of_all_that_is_there_and_of_what_takes_another_route(monkeypatch):
    told, made = [], []
    plan, capacity = policy.plan, book.Capacity

    def watch(queue, views, capacity, *, num_second, **more):
        told.append(num_second)
        return plan(queue, views, capacity, num_second=num_second, **more)

    monkeypatch.setattr(policy, "plan", watch)
    monkeypatch.setattr(book, "Capacity", lambda views: made.append(views) or capacity(views))
    async with a_queue() as queue:
        small = queue.add_worker("small", "prefill", num_pages=10)
        queue.add_worker("b", "both", max_step_sequences=1)
        running = await queue.placed_now(StubSample())
        calls = [queue.place(StubSample(num_tokens=num_tokens)) for num_tokens in (20, 200, 200, 20)]
        await queue.settle()
        assert told == [0, 2]
        calls[1].cancel()
        small.hold()  # it is there, and the short ones wait for it
        running.release()
        long = await queue.result(calls[2])
        assert (long.prefill, told[2:]) == (None, [1])
        small.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=10))
        long.release()
        await queue.result(calls[0])
        assert told[3:] == [0]
        assert len(made) == 2, "of nobody, and of these two"


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
async def test_all_of_a_kind_are_looked_for_however_many_there_are():
    async with a_queue() as queue:
        large = queue.add_worker("large", "prefill", max_step_tokens=50)
        queue.add_worker("small", "prefill", num_pages=10)
        queue.add_worker("d", "decode", num_pages=1000)
        large.on_report(worker_service_pb2.WatchLoadResponse(num_free_pages=100, num_waiting_tokens=1))
        calls = [queue.place(StubSample(num_tokens=num_tokens)) for num_tokens in (400, 20, 400, 20)]
        await queue.settle()
        assert [call.done() for call in calls] == [False, True, False, True]


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
        assert not queue.dispatcher._book._kinds
