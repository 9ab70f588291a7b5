"""Work on threads by size: what is small never waits for what is large, and nothing begins too late."""

import asyncio
import threading
import time

import pytest
from headrace_core.errors import DeadlineError
from headrace_core.shares import Caller
from headrace_core.testing.async_test import WAIT_S
from headrace_router.testing import wait_until
from headrace_router.text.size_lanes import SizeLanes

CALLER = Caller("a", "one")


class Work:
    """Work that begins and ends when told."""

    def __init__(self):
        self.go_on = threading.Event()
        self.num_calls = 0

    @property
    def begun(self):
        return self.num_calls > 0

    def __call__(self, lane):
        self.num_calls += 1
        assert self.go_on.wait(WAIT_S), "nobody let it go on"
        return lane


def run(test, borders=(10, 100)):
    async def main():
        lanes = SizeLanes("test", borders)
        try:
            await test(lanes)
        finally:
            lanes.close()

    asyncio.run(main())


def later():
    return time.monotonic() + WAIT_S


def test_a_size_has_the_first_lane_that_takes_it():
    async def test(lanes):
        assert lanes.num_lanes == 3
        sizes = (0, 10, 11, 100, 101, 1 << 40)
        assert [await lanes.run(size, CALLER, later(), lambda lane: lane) for size in sizes] == [0, 0, 1, 1, 2, 2]

    run(test)


def test_small_work_is_done_while_every_larger_lane_is_taken():
    async def test(lanes):
        large = [Work() for _ in range(6)]
        tasks = [
            asyncio.create_task(lanes.run(50 + 100 * (i % 2), CALLER, later(), work)) for i, work in enumerate(large)
        ]
        await wait_until(lambda: large[0].begun and large[1].begun)
        assert [await lanes.run(1, CALLER, later(), lambda lane: lane) for _ in range(20)] == [0] * 20
        assert [work.num_calls for work in large] == [1, 1, 0, 0, 0, 0], "a lane takes one at a time"
        for work in large:
            work.go_on.set()
        assert await asyncio.gather(*tasks) == [1, 2] * 3

    run(test)


def test_what_waited_past_its_deadline_is_never_begun():
    async def test(lanes):
        first, second = Work(), Work()
        task = asyncio.create_task(lanes.run(5, CALLER, later(), first))
        await wait_until(lambda: first.begun)
        with pytest.raises(DeadlineError) as caught:
            await lanes.run(5, CALLER, time.monotonic() + 0.02, second)
        assert caught.value.reason == "DEADLINE_EXCEEDED"
        first.go_on.set()
        assert await task == 0
        assert await lanes.run(5, CALLER, later(), lambda lane: lane) == 0
        assert second.num_calls == 0

    run(test)


def test_what_comes_past_its_deadline_is_never_begun():
    async def test(lanes):
        work = Work()
        with pytest.raises(DeadlineError):
            await lanes.run(5, CALLER, time.monotonic(), work)
        assert work.num_calls == 0

    run(test)


def test_work_whose_caller_is_gone_is_never_begun_or_keeps_its_lane_to_its_end():
    async def test(lanes):
        first, second, third = Work(), Work(), Work()
        tasks = [asyncio.create_task(lanes.run(5, CALLER, later(), work)) for work in (first, second, third)]
        await wait_until(lambda: first.begun)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait(tasks[:2])
        assert third.num_calls == 0, "the first still runs"
        third.go_on.set()
        first.go_on.set()
        assert await tasks[2] == 0
        assert (first.num_calls, second.num_calls, third.num_calls) == (1, 0, 1)

    run(test)


def test_what_work_raises_comes_to_its_caller_and_frees_the_lane():
    async def test(lanes):
        def fail(_):
            raise ValueError("no")

        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await lanes.run(5, CALLER, later(), fail)
        assert await lanes.run(5, CALLER, later(), lambda lane: lane) == 0

    run(test)


def test_one_callers_many_hold_up_anothers_one_by_one_and_its_address_others_no_more():
    async def test(lanes):
        work, order = Work(), []

        def queue(name, address):
            return asyncio.create_task(lanes.run(5, Caller(name, address), later(), lambda _: order.append(name)))

        tasks = [asyncio.create_task(lanes.run(5, CALLER, later(), work))]
        await wait_until(lambda: work.begun)
        tasks += [queue("a", "one") for _ in range(20)]
        tasks += [queue(f"made up {i}", "one") for i in range(20)]
        tasks += [queue(name, address) for name, address in (("b", "one"), ("c", "two"), ("c", "two"))]
        await asyncio.sleep(0)
        work.go_on.set()
        await asyncio.gather(*tasks)
        assert [i for i, name in enumerate(order) if name == "c"] == [1, 3]
        assert order.index("b") <= 24, "one of each name's before it, and two of another address"

    run(test)


def test_who_is_gone_as_its_turn_comes_lets_the_next_begin():
    async def test(lanes):
        first, second, third = Work(), Work(), Work()
        tasks = [asyncio.create_task(lanes.run(5, CALLER, later(), work)) for work in (first, second, third)]
        await wait_until(lambda: first.begun)
        release = lanes._turns[0].release

        def cancel_second():
            release()
            lanes._turns[0].release = release
            tasks[1].cancel()

        lanes._turns[0].release = cancel_second
        third.go_on.set()
        first.go_on.set()
        assert await tasks[2] == 0
        assert (second.num_calls, tasks[1].cancelled()) == (0, True)
        assert await lanes.run(5, CALLER, later(), lambda lane: lane) == 0

    run(test)
