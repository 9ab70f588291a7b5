"""SIGTERM of a decode worker amid long streams, between real processes around the fake model.

Where another decode worker is there, it goes on with every stream from the pages of the one that leaves, which exits
when they are taken, long before any stream ends. Steps are held where a test says so, so nothing depends on speed.
"""

import asyncio
import contextlib
import signal
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S, async_test

from tests.matrix.asking import alone
from tests.matrix.process import ChildProcess
from tests.matrix.scene import Scene, until

MOST = 90
NUM_STEPS = 14
"""So many steps are made at the worker that leaves, once all streams run there."""
STOPS_AFTER = 60
GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=MOST, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.1, top_p=0.95, seed=5, max_tokens=MOST, ignore_eos=True)
PENALISED = replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, min_p=0.01)
LOGPROBS = replace(SEEDED, top_logprobs=3)
KINDS = {
    "greedy": (GREEDY, 1),
    "seeded": (SEEDED, 1),
    "penalised": (PENALISED, 1),
    "logprobs": (LOGPROBS, 1),
    "several": (replace(SEEDED, seed=8), 2),
}


def prompt(number: int) -> list[int]:
    return [(31 * i + 7 * number) % 250 + 1 for i in range(37 + 5 * number)]


@dataclass
class Asked:
    """One stream under way."""

    task: asyncio.Task[Any]
    wanted: list[list[int]]
    stop: str = ""


@dataclass
class Streams:
    """Streams of every kind that all run at the first decode worker, a step of which is held."""

    scene: Scene
    asked: list[Asked] = field(default_factory=list)

    @property
    def leaving(self) -> ChildProcess:
        return self.scene.decode

    @property
    def spares(self) -> list[ChildProcess]:
        return [process for process in self.scene.workers if process.role == "decode"][1:]

    @property
    def num_samples(self) -> int:
        return sum(len(each.wanted) for each in self.asked)

    async def begin(self) -> None:
        """Start them, and return when so many tokens of each are out."""
        kinds = [(prompt(number), *kind) for number, kind in enumerate(KINDS.values())]
        wanted = await alone([*kinds, (prompt(9), GREEDY, 1)])
        stop_tokens, stop = _stop_string(wanted[-1][0])
        for (token_ids, params, n), samples in zip(kinds, wanted, strict=False):
            self._ask(token_ids, params, samples, n=n)
        self._ask(prompt(9), replace(GREEDY, stop_strings=(stop,)), [stop_tokens], stop=stop)
        await self.leaving.ask("hold_steps", 0)
        await self.all_run_at(self.leaving)
        await self.leaving.ask("hold_steps", NUM_STEPS)
        await self.leaving.ask("step_held")

    async def all_run_at(self, process: ChildProcess) -> None:
        """Return when they do, and a step is held or about to be: as few are made as joining takes."""

        async def is_so() -> bool:
            gauges = await process.ask("gauges")
            if gauges["headrace_running_sequences"] == self.num_samples:
                return True
            if not gauges["headrace_handoffs"]:  # what is here joins between two steps
                await process.ask("hold_steps", 1)
            return False

        await until(is_so)

    async def leave(self) -> None:
        """End the first decode worker; steps of others, if there are any, are held."""
        for spare in self.spares:
            await spare.ask("hold_steps", 0)
        await self.scene.list_workers()
        self.leaving.signal(signal.SIGTERM)
        await self.leaving.ask("draining")
        await self.leaving.ask("release")

    async def check(self) -> None:
        """Let every stream end; check its tokens, and that nothing is left anywhere."""
        await self.scene.on_all("release")
        for each in self.asked:
            generation = await each.task
            for sample, wanted in zip(generation.samples, each.wanted, strict=True):
                assert list(sample.token_ids) == wanted
                assert sample.matched_stop_string == each.stop
                assert len(sample.logprobs) in (0, len(wanted))
        await self.scene.on_all("free")
        assert await self.scene.end() == []

    async def metric(self, process: ChildProcess, name: str) -> float:
        return (await process.ask("gauges"))[f"headrace_{name}"]

    def are_under_way(self) -> bool:
        return not any(each.task.done() for each in self.asked)

    def _ask(self, token_ids, params, wanted, *, n=1, stop="") -> None:
        call = self.scene.client.generate(token_ids, params, n=n, timeout_s=WAIT_S)
        self.asked.append(Asked(asyncio.create_task(call), wanted, stop))


def _stop_string(token_ids: list[int]) -> tuple[list[int], str]:
    """Return two letters that the tokens, which are bytes, have after the move for the first time, and up to there."""
    text = bytes(token_id if token_id < 128 else 0 for token_id in token_ids)
    for end in range(STOPS_AFTER, len(text)):
        pair = text[end - 2 : end]
        if pair.isascii() and min(pair) > 32 and text.index(pair) == end - 2:
            return token_ids[:end], pair.decode()
    raise AssertionError("no such pair: take another prompt")


@contextlib.asynccontextmanager
async def streams(**options):
    async with Scene(num_slots=16, **options) as scene:
        found = Streams(scene)
        try:
            await found.begin()
            yield found
        finally:
            for each in found.asked:
                each.task.cancel()
            await asyncio.gather(*(each.task for each in found.asked), return_exceptions=True)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@async_test
async def test_every_stream_goes_on_elsewhere_and_the_worker_is_gone_before_any_ends(transport: str):
    async with streams(num_spares=1, transport=transport) as all_streams:
        prefills = [process for process in all_streams.scene.workers if process.role == "prefill"]
        computed = [await all_streams.metric(prefill, "step_tokens_total") for prefill in prefills[:1]]
        await all_streams.leave()
        (spare,) = all_streams.spares
        await all_streams.all_run_at(spare)
        assert await all_streams.leaving.ended() == 0
        assert all_streams.are_under_way(), "nobody waited for their end"
        assert await all_streams.metric(all_streams.scene.router, "moved_sequences_total") == 7
        assert await all_streams.metric(spare, "prefix_fetched_tokens_total") > 7 * (37 + NUM_STEPS - 4)
        assert await all_streams.scene.router.ask("failures") == {}
        assert await all_streams.metric(spare, "step_tokens_total") < 7 * 37, "no more than what is no full page"
        assert [await all_streams.metric(prefill, "step_tokens_total") for prefill in prefills] == [*computed, 0]
        await all_streams.check()


@async_test
async def test_without_another_decode_worker_it_ends_its_streams_itself():
    async with streams() as all_streams:
        await all_streams.leave()
        for each in all_streams.asked:
            await each.task
        assert await all_streams.metric(all_streams.scene.router, "moved_sequences_total") == 0
        assert await all_streams.leaving.ended() == 0
        await all_streams.check()


@pytest.mark.parametrize("how", ["killed", "a second SIGTERM", "killed, and another one at its address"])
@async_test
async def test_the_one_that_leaves_is_gone_before_its_pages_are_taken(how: str):
    async with streams(num_spares=1) as all_streams:
        (spare,) = all_streams.spares
        await spare.ask("shut", "transferring", 0)
        await all_streams.leave()
        await spare.ask("reached", "transferring")
        all_streams.leaving.signal(signal.SIGTERM if how == "a second SIGTERM" else signal.SIGKILL)
        leaving = all_streams.leaving
        assert await leaving.ended() == (130 if how == "a second SIGTERM" else -signal.SIGKILL)
        leaving.is_terminated = False  # it had no time to say what it leaves
        if how.endswith("address"):
            await all_streams.scene.restart(leaving)
        await all_streams.scene.on_all("release")
        await all_streams.check()


@async_test
async def test_the_one_that_takes_the_pages_is_lost_and_a_third_one_takes_them():
    async with streams(num_spares=2) as all_streams:
        for spare in all_streams.spares:
            await spare.ask("shut", "transferring", 0)
        await all_streams.leave()
        first, second = all_streams.spares
        asked = [asyncio.ensure_future(spare.ask("reached", "transferring")) for spare in (first, second)]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for reached in done:
            reached.result()
        lost, other = (first, second) if asked[0].done() else (second, first)
        lost.signal(signal.SIGKILL)
        await lost.ended()
        await other.ask("release")
        assert await all_streams.leaving.ended() == 0, "its pages are with the third"
        assert set(await all_streams.scene.router.ask("failures")) <= {"WORKER_LOST"}
        await all_streams.check()
        await asyncio.gather(*asked, return_exceptions=True)
