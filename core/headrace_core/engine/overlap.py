"""The engine that plans and launches a step while the one before it is computed, and applies that one meanwhile.

    serial    plan 1 · compute 1 · apply 1 · plan 2 · compute 2 · apply 2
    here      plan 1 · launch 1 · plan 2 · launch 2 · apply 1 · plan 3 · launch 3 · apply 2 ...
                       compute 1 ──────────────────► compute 2 ──────────────────► compute 3

A step is planned as if the one under way were over and had ended nobody but by length. So it names tokens that are not
known yet: the executor, who has a book of its own, puts them in when they are. Who ends otherwise has a row computed in
vain, which nobody is told of. Pages that a launched step names are given to nobody before it is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from headrace_core.batch.executor_book import ExecutorBook
from headrace_core.batch.scheduler import Scheduler
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.batch.step_diff import Differ, StepDiff
from headrace_core.engine.engine import Engine, Pending

_STAND_IN = 0
"""A token for a sequence that failed, of which a row was launched already: what comes of it is not looked at."""


class AheadScheduler(Scheduler[Any], Protocol):
    """A scheduler that can plan while a step of its is computed."""

    def plan_ahead(self, now: float) -> StepPlan | None:
        """Choose the step after the one under way; None if there is none before that one is applied."""
        ...


A = TypeVar("A", bound=AheadScheduler)


class OverlappedEngine(Engine[A]):
    """See the module, and `Engine`; nobody is told how far a step is, so prompts sealed by layers are not for it."""

    def __init__(self, scheduler: A, step: Callable[..., StepResult], **options: Any) -> None:
        super().__init__(scheduler, step, **options)
        assert self._watch is None, "nobody is told of layers"
        self._differ = Differ()
        self._book = ExecutorBook("of this process")
        self._executor = ThreadPoolExecutor(1, "executor")

    def _steps(self) -> None:
        under_way: tuple[StepPlan, Pending] | None = None
        is_idle = True
        with self._executor:
            while self._take_commands(wait=is_idle):
                plan = self._plan(self._scheduler.plan_ahead if under_way else self._scheduler.plan)
                launched = (plan, self._launch(plan)) if plan else None
                if under_way:
                    self._apply(*under_way)
                is_idle = not launched and not under_way
                under_way = launched
                if is_idle:
                    self._rest()
            if under_way:
                self._apply(*under_way)

    def _launch(self, plan: StepPlan) -> Future[StepResult]:
        diff = self._differ.diff(plan, self._scheduler.running_keys())
        return self._executor.submit(self._compute, diff)

    def _compute(self, diff: StepDiff) -> StepResult:
        result = self._halves.run(self._book.plan(diff))
        sampled = {key: [token.token_id for token in tokens] for key, tokens in result.tokens.items()}
        self._book.sampled({**sampled, **{key: [_STAND_IN] for key in result.failures}})
        return result
