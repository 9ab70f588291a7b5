"""The engine thread blocks when idle, runs commands in order, survives failed steps, ends on a broken scheduler."""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from headrace_core.batch.scheduler import Load
from headrace_core.batch.step import Chunk, FatalStepError, ForwardPlan, OnStop, StepPlan, StepResult
from headrace_core.engine.engine import Engine, News
from headrace_core.errors import HeadraceError
from headrace_core.request import SampledToken
from headrace_core.testing.async_test import WAIT_S, async_test, eventually


class CountingScheduler:
    """Plans as many steps as it is told to, of `num_rows`; events are what happened."""

    def __init__(self) -> None:
        self.num_wanted = 0
        self.num_rows = 1
        self.results: list[StepResult] = []
        self.num_plans = 0
        self._events: list[str] = []

    def want(self, count: int) -> None:
        self.num_wanted += count
        self._events.append(f"want {count}")

    def plan(self, now: float) -> StepPlan | None:
        self.num_plans += 1
        chunks = [Chunk(key, [1, 2], 0, [key], False, f"r{key}") for key in range(self.num_rows)]
        return StepPlan(ForwardPlan(chunks, [0, self.num_rows - 1])) if self.num_wanted else None

    def apply(self, result: StepResult, now: float) -> None:
        self.num_wanted -= 1
        self.results.append(result)
        self._events += [error.reason for error in result.failures.values()] or ["applied"]

    def take_events(self) -> Sequence[str]:
        events, self._events = self._events, []
        return events

    def load(self) -> Load:
        return Load(num_running=self.num_wanted)


class Harness:
    def __init__(self, step: Callable[[StepPlan], StepResult]) -> None:
        self.scheduler = CountingScheduler()
        self.news: list[News[Any]] = []
        self.fatal: list[BaseException] = []
        self.engine: Engine[CountingScheduler] = Engine(
            self.scheduler, lambda plan, on_stop: step(plan), deliver=self.news.append, on_fatal=self.fatal.append
        )
        self.engine.start()

    @property
    def events(self) -> list[str]:
        return [event for news in self.news for event in news.events]


def fine(plan: StepPlan) -> StepResult:
    return StepResult({}, 0.5)


@async_test
async def test_an_idle_engine_blocks_and_a_command_wakes_it():
    harness = Harness(fine)
    for _ in range(3):
        harness.engine.submit(lambda scheduler: scheduler.want(1))
    await eventually(lambda: harness.events.count("applied") == 3, "three steps ran")
    await harness.engine.stop()
    assert harness.scheduler.num_plans <= 6, "it planned without having been asked"
    reports = [news.report for news in harness.news if news.report]
    assert [(report.num_tokens, report.duration_s) for report in reports] == [(2, 0.5)] * 3


@async_test
async def test_commands_run_in_order_before_the_next_step():
    harness = Harness(fine)
    for count in range(1, 4):
        harness.engine.submit(lambda scheduler, count=count: scheduler.want(count))
    await eventually(lambda: harness.events.count("applied") == 6, "six steps ran")
    assert [event for event in harness.events if event != "applied"] == ["want 1", "want 2", "want 3"]
    await harness.engine.stop()


@async_test
async def test_a_failed_step_fails_its_sequences_only():
    errors: list[Exception] = [HeadraceError("BAD_LOGITS", "nan"), RuntimeError("broken")]

    def step(plan: StepPlan) -> StepResult:
        if errors:
            raise errors.pop(0)
        return fine(plan)

    harness = Harness(step)
    harness.engine.submit(lambda scheduler: scheduler.want(3))
    await eventually(lambda: "applied" in harness.events, "the third step ran")
    assert harness.events == ["want 3", "BAD_LOGITS", "ENGINE_FAILED", "applied"]
    messages = [str(error) for result in harness.scheduler.results for error in result.failures.values()]
    assert messages[0] == "request r0: nan"
    assert "request r0" in messages[1]
    assert "RuntimeError" in messages[1]
    assert not harness.fatal
    await harness.engine.stop()


class Steps:
    """A model's side of a step that raises when its chunks have all of a group of keys; counts what it computes."""

    def __init__(self, *groups: set[int]) -> None:
        self.groups = groups
        self.runs: list[StepPlan] = []

    def __call__(self, plan: StepPlan) -> StepResult:
        self.runs.append(plan)
        keys = {chunk.key for chunk in plan.chunks}
        if any(group <= keys for group in self.groups):
            raise RuntimeError("broken")
        return StepResult({key: [SampledToken(100 + key)] for key in keys}, 0.5, {1: [len(keys), 1]})

    def num_runs(self, key: int) -> int:
        return sum(key in {chunk.key for chunk in plan.chunks} for plan in self.runs)


async def result_of(step: Steps, num_rows: int) -> StepResult:
    harness = Harness(step)
    harness.scheduler.num_rows = num_rows
    harness.engine.submit(lambda scheduler: scheduler.want(1))
    await eventually(lambda: bool(harness.scheduler.results), "the step ran")
    await harness.engine.stop()
    assert not harness.fatal
    return harness.scheduler.results[0]


@pytest.mark.parametrize(
    ("groups", "failed"),
    [
        ([{5}], {5}),
        ([{0}, {6}], {0, 6}),
        ([{0, 6}], set()),
        ([{2, 3}, {2, 6}, {4}], {4}),
        ([{key} for key in range(7)], set(range(7))),
    ],
    ids=["one", "two", "only together", "both", "all"],
)
@async_test
async def test_only_what_raises_alone_fails_and_nobody_is_computed_too_often(groups: list[set[int]], failed: set[int]):
    step = Steps(*groups)
    result = await result_of(step, 7)
    assert set(result.failures) == failed
    assert {key: token.token_id for key, (token,) in result.tokens.items()} == {
        key: 100 + key for key in range(7) if key not in failed
    }
    assert all(str(error).startswith(f"request r{key}: ") for key, error in result.failures.items())
    assert max(step.num_runs(key) for key in range(7)) <= 1 + math.ceil(math.log2(7))


@async_test
async def test_a_step_run_in_halves_counts_once_what_was_computed():
    result = await result_of(Steps({5}), 8)
    assert result.expert_counts[1][0] == 7, "tokens of the rows that succeeded"
    assert result.timing is None
    assert result.duration_s >= 0


@async_test
async def test_each_half_zeroes_the_pages_of_its_own_chunks():
    """Those of the other may have been written already."""
    step = Steps({5})
    await result_of(step, 8)
    for plan in step.runs:
        own = {page_id for chunk in plan.chunks for page_id in chunk.page_ids}
        assert plan.forward.zero_page_ids == [page_id for page_id in (0, 7) if page_id in own]


@async_test
async def test_a_device_lost_while_halves_run_is_fatal():
    def lost(plan: StepPlan) -> StepResult:
        raise RuntimeError("broken") if len(plan.chunks) == 4 else FatalStepError("device")

    harness = Harness(lost)
    harness.scheduler.num_rows = 4
    harness.engine.submit(lambda scheduler: scheduler.want(1))
    await eventually(lambda: bool(harness.fatal), "the engine died")
    assert isinstance(harness.fatal[0], FatalStepError)
    await harness.engine.stop()


@async_test
async def test_a_lost_device_or_a_broken_scheduler_is_fatal():
    def lost(plan: StepPlan) -> StepResult:
        raise FatalStepError("device")

    harness = Harness(lost)
    harness.engine.submit(lambda scheduler: scheduler.want(1))
    await eventually(lambda: bool(harness.fatal), "the engine died")
    assert isinstance(harness.fatal[0], FatalStepError)
    broken = Harness(fine)
    broken.engine.submit(lambda scheduler: scheduler.missing)  # pyright: ignore
    await eventually(lambda: bool(broken.fatal), "the engine died")
    await asyncio.gather(harness.engine.stop(), broken.engine.stop())


class Watching(CountingScheduler):
    """One that is told how far its step is, and tells."""

    def plan(self, now: float) -> StepPlan | None:
        plan = super().plan(now)
        return StepPlan(replace(plan.forward, stops=(1, 2))) if plan else None

    def layers_done(self, num_layers: int, mark: object) -> None:
        self._events.append(f"{num_layers} layers, {mark}")

    def step_raised(self) -> None:
        self._events.append("raised")


@async_test
async def test_what_is_told_at_a_stop_goes_out_while_the_step_runs():
    news: list[News[Any]] = []
    may_end = threading.Event()

    def step(plan: StepPlan, on_stop: OnStop | None) -> StepResult:
        assert on_stop is not None
        for stop in plan.forward.stops:
            on_stop(stop, "m")
        assert may_end.wait(WAIT_S)
        return fine(plan)

    scheduler = Watching()
    engine: Engine[Watching] = Engine(
        scheduler, step, deliver=news.append, on_fatal=lambda error: None, watch=scheduler
    )
    engine.start()
    engine.submit(lambda scheduler: scheduler.want(1))

    def told() -> list[str]:
        return [event for each in news for event in each.events]

    await eventually(lambda: told() == ["want 1", "1 layers, m", "2 layers, m"], "both stops are told")
    may_end.set()
    await eventually(lambda: told()[-1] == "applied", "the step ended")
    assert [each.report is not None for each in news if "layers" in str(each.events)] == [False, False]
    await engine.stop()


@async_test
async def test_who_watches_is_told_before_a_step_that_raised_is_run_again_and_of_no_stop_then():
    ran: list[tuple[int, tuple[int, ...], list[str]]] = []
    scheduler = Watching()
    scheduler.num_rows = 2

    def step(plan: StepPlan, on_stop: OnStop | None) -> StepResult:
        ran.append((len(plan.chunks), plan.forward.stops, list(scheduler._events)))
        if len(plan.chunks) == 2:
            raise RuntimeError("broken")
        return fine(plan)

    engine: Engine[Watching] = Engine(
        scheduler, step, deliver=lambda news: None, on_fatal=lambda error: None, watch=scheduler
    )
    engine.start()
    engine.submit(lambda scheduler: scheduler.want(1))
    await eventually(lambda: bool(scheduler.results), "the step ran")
    await engine.stop()
    assert ran == [(2, (1, 2), []), (1, (), ["raised"]), (1, (), ["raised"])]


@async_test
async def test_a_step_that_nobody_watches_has_nobody_to_tell():
    asked: list[object] = []

    def step(plan: StepPlan, on_stop: OnStop | None) -> StepResult:
        asked.append(on_stop)
        return fine(plan)

    scheduler = CountingScheduler()
    engine: Engine[CountingScheduler] = Engine(scheduler, step, deliver=lambda news: None, on_fatal=lambda error: None)
    engine.start()
    engine.submit(lambda scheduler: scheduler.want(1))
    await eventually(lambda: bool(scheduler.results), "the step ran")
    await engine.stop()
    assert asked == [None]


class HeldStep:
    """A step that waits until it may end."""

    def __init__(self) -> None:
        self.is_under_way = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, plan: StepPlan) -> StepResult:
        self.is_under_way.set()
        assert self.may_end.wait(WAIT_S)
        return fine(plan)


@async_test
async def test_what_need_not_wait_for_a_step_is_done_and_told_while_it_runs():
    step = HeldStep()
    harness = Harness(step)
    harness.engine.submit(lambda scheduler: scheduler.want(1))
    await asyncio.to_thread(step.is_under_way.wait, WAIT_S)
    harness.engine.submit(lambda scheduler: scheduler.want(5))
    harness.engine.submit_at_once(lambda scheduler: scheduler.want(7))
    assert harness.scheduler.num_wanted == 8, "here and now, before what waits for the step"
    await eventually(lambda: harness.events == ["want 1", "want 7"], "it is told")
    step.may_end.set()
    await eventually(lambda: harness.events.count("applied") == 13, "all steps ran")
    assert harness.events[:4] == ["want 1", "want 7", "applied", "want 5"]
    await harness.engine.stop()


@async_test
async def test_what_is_done_at_once_while_nothing_runs_is_planned():
    harness = Harness(fine)
    harness.engine.submit_at_once(lambda scheduler: scheduler.want(2))
    await eventually(lambda: harness.events == ["want 2", "applied", "applied"], "it was planned")
    await harness.engine.stop()


@async_test
async def test_what_is_to_be_done_at_once_waits_in_the_queue_while_the_engine_uses_its_scheduler():
    harness = Harness(fine)
    is_inside, may_end = threading.Event(), threading.Event()

    def long(scheduler: CountingScheduler) -> None:
        is_inside.set()
        assert may_end.wait(WAIT_S)

    harness.engine.submit(long)
    await asyncio.to_thread(is_inside.wait, WAIT_S)
    harness.engine.submit_at_once(lambda scheduler: scheduler.want(1))
    assert harness.scheduler.num_wanted == 0
    may_end.set()
    await eventually(lambda: harness.events == ["want 1", "applied"], "its turn came")
    await harness.engine.stop()


@async_test
async def test_what_fails_at_once_is_fatal_as_it_is_between_steps():
    harness = Harness(fine)
    harness.engine.submit_at_once(lambda scheduler: scheduler.missing)  # pyright: ignore
    assert isinstance(harness.fatal[0], AttributeError)
    await harness.engine.stop()


@async_test
async def test_it_says_when_it_has_nothing_to_compute_and_not_between_steps():
    told: list[str] = []
    scheduler = CountingScheduler()

    def step(plan: StepPlan, on_stop: OnStop | None) -> StepResult:
        told.append("step")
        return fine(plan)

    engine: Engine[CountingScheduler] = Engine(
        scheduler, step, deliver=lambda news: None, on_fatal=lambda error: None, rest=lambda: told.append("rest")
    )
    engine.submit(lambda scheduler: scheduler.want(3))
    engine.start()
    await eventually(lambda: told[-1:] == ["rest"], "it waits")
    await engine.stop()
    assert told == ["step", "step", "step", "rest"]
