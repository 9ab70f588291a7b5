"""The engine thread blocks when idle, runs commands in order, survives failed steps, ends on a broken scheduler."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from headrace_core.batch.scheduler import Load
from headrace_core.batch.step import Chunk, StepPlan, StepResult
from headrace_core.engine.engine import Engine, FatalStepError, News
from headrace_core.errors import HeadraceError
from headrace_core.testing.async_test import async_test, eventually


class CountingScheduler:
    """Plans as many steps as it is told to; events are what happened."""

    def __init__(self) -> None:
        self.num_wanted = 0
        self.num_plans = 0
        self._events: list[str] = []

    def want(self, count: int) -> None:
        self.num_wanted += count
        self._events.append(f"want {count}")

    def plan(self, now: float) -> StepPlan | None:
        self.num_plans += 1
        return StepPlan([Chunk(1, [1, 2], 0, [0], None)]) if self.num_wanted else None

    def apply(self, result: StepResult, now: float) -> None:
        self.num_wanted -= 1
        self._events.append("applied")

    def fail_step(self, error: HeadraceError, now: float) -> None:
        self.num_wanted -= 1
        self._events.append(error.reason)

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
            self.scheduler, step, deliver=self.news.append, on_fatal=self.fatal.append
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
    assert not harness.fatal
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
