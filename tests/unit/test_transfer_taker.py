"""Rule 1: so many pulls at a time, the oldest first, and a turn is never lost, whoever gives up."""

import asyncio
import os

import pytest
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.testing.async_test import async_test
from headrace_core.testing.handoff_parts import PlainMemory
from headrace_core.transfer.moving_time import MovingTime
from headrace_core.transfer.pulls import Pulls
from headrace_core.transfer.taker import Taker


class Crowd:
    """Takes turns that last until they are told to end."""

    def __init__(self, most: int) -> None:
        self.pulls = Pulls(most)
        self.inside: list[int] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.ends: dict[int, asyncio.Event] = {}

    async def join(self, age: int) -> None:
        self.ends[age] = asyncio.Event()
        self.tasks[age] = asyncio.create_task(self._take(age))
        await self.settle()

    async def end(self, age: int) -> None:
        self.ends[age].set()
        await self.settle()

    async def cancel(self, age: int) -> None:
        self.tasks[age].cancel()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def _take(self, age: int) -> None:
        async with self.pulls.turn(age):
            self.inside.append(age)
            try:
                await self.ends[age].wait()
            finally:
                self.inside.remove(age)


@async_test
async def test_turns_are_bounded_and_the_lowest_age_is_next():
    crowd = Crowd(2)
    for age in (5, 9, 7, 3, 8):
        await crowd.join(age)
    assert crowd.inside == [5, 9]
    for leaving, inside in ((9, [5, 3]), (5, [3, 7]), (3, [7, 8]), (7, [8]), (8, [])):
        await crowd.end(leaving)
        assert crowd.inside == inside
    await crowd.join(1)
    assert crowd.inside == [1]
    await crowd.end(1)


@pytest.mark.parametrize("victim", [5, 7, 8])
@async_test
async def test_a_turn_is_not_lost_with_who_gave_up(victim: int):
    crowd = Crowd(1)
    for age in (5, 7, 8):
        await crowd.join(age)
    await crowd.cancel(victim)
    left = [age for age in (5, 7, 8) if age != victim]
    for age in left:
        assert crowd.inside == [age]
        await crowd.end(age)
    await crowd.join(9)
    assert crowd.inside == [9]
    await crowd.end(9)


@async_test
async def test_a_turn_given_in_the_very_moment_of_giving_up_goes_to_the_next():
    crowd = Crowd(1)
    for age in (5, 7, 8):
        await crowd.join(age)
    crowd.ends[5].set()
    await asyncio.sleep(0)  # 5 goes, and 7 has the turn, but has not run yet
    crowd.tasks[7].cancel()
    await crowd.settle()
    assert crowd.inside == [8]
    await crowd.end(8)


@async_test
async def test_rule_1_verifying_gives_way_to_steps():
    layout = KvLayout(2, 4, CacheDtype.FLOAT32, LatentAttention(3, 1))
    taker = Taker(PlainMemory(), fingerprint="", layout=layout, vocab_size=9, transports={}, timeout_s=1)
    niceness = await asyncio.wrap_future(taker.verifying.submit(os.getpriority, os.PRIO_PROCESS, 0))
    assert niceness > os.getpriority(os.PRIO_PROCESS, 0)
    await taker.close()


@async_test
async def test_what_moves_at_the_same_time_is_counted_once_and_pauses_are_not():
    now_s = 0.0
    moving = MovingTime(lambda: now_s)
    assert moving.seconds == 0
    async with moving:
        now_s = 1
        async with moving:
            now_s = 3
            assert moving.seconds == 3
        now_s = 4
    now_s = 10
    assert moving.seconds == 4
    async with moving:
        now_s = 11
        assert moving.seconds == 5
    assert moving.seconds == 5
