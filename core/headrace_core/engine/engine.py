"""The engine thread: plan, step, apply.

The event loop and this thread meet at two queues. Inwards: commands, functions that run on the scheduler between two
steps. Outwards: the scheduler's events, handed to the loop once per step. An idle engine blocks; one that leads a group
of ranks beats meanwhile.

A step is launched, which gives what will hold its result, and applied when that is there. Here one follows the other,
and the next step is planned then; `overlap` has the twin that plans and launches a step while the one before it is
computed.

While a step is computed nobody uses the scheduler. What need not wait for the step, and changes nothing that the step
uses, may be run meanwhile by whoever wants it: `_books` is the lock that one has who uses the scheduler.

A step that raises is run again in halves (`halves`). Only a lost device ends more than a sequence. Anything raised
outside a step means that our own books can't be trusted: the thread ends, and the process with it.

A scheduler that hands on pages of a step's first layers while the later ones are computed is the engine's `watch` as
well: it is told where the step is, and what it tells of that goes out at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from headrace_core.batch.scheduler import Load, Scheduler
from headrace_core.batch.step import LayerWatch, Mark, OnStop, StepPlan, StepResult, StepTiming
from headrace_core.engine.halves import Halves

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did, for metrics. Of `num_drafted` tokens, of `num_drafts` sequences, `num_accepted` were right."""

    num_tokens: int
    duration_s: float
    expert_counts: dict[int, list[int]]
    timing: StepTiming | None = None
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


E_co = TypeVar("E_co", covariant=True)


@dataclass(frozen=True, slots=True)
class News(Generic[E_co]):
    """What the engine thread tells the event loop, at most once per step; `report` is None if no step ran."""

    events: Sequence[E_co]
    report: StepReport | None
    load: Load


class Pending(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for what came of it.

        Raises:
            FatalStepError: no later step can be run.
        """
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that was over when it was launched."""

    outcome: StepResult

    def result(self) -> StepResult:
        """See `Pending`."""
        return self.outcome


S = TypeVar("S", bound=Scheduler[Any])


@dataclass(frozen=True, slots=True)
class Beat:
    """What is run on the engine thread while it waits for work, once in `period_s`."""

    run: Callable[[], None]
    period_s: float


class Engine(Generic[S]):
    """Runs a scheduler against a model on a thread of its own.

    `deliver` and `on_fatal` are called on the event loop, `rest` on the engine thread before it waits for work, `beat`
    while it waits.
    """

    def __init__(
        self,
        scheduler: S,
        step: Callable[[StepPlan, OnStop | None], StepResult],
        *,
        deliver: Callable[[News[Any]], None],
        on_fatal: Callable[[BaseException], None],
        watch: LayerWatch | None = None,
        rest: Callable[[], None] | None = None,
        beat: Beat | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._watch = watch
        self._beat = beat
        self._rest = rest or _nothing
        self._deliver = deliver
        self._on_fatal = on_fatal
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[S], None] | None] = queue.SimpleQueue()
        self._books = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._load = Load()
        self._halves = Halves(lambda plan: step(plan, self._on_stop if watch else None), self._step_raised, clock=clock)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: Callable[[S], None]) -> None:
        """Run `command` on the scheduler between two steps, after those submitted before. Any thread."""
        self._commands.put(command)

    def submit_at_once(self, command: Callable[[S], None]) -> None:
        """Run `command` here and now if the engine computes or is idle; else as `submit` does. Event loop only.

        It must change nothing that a step under way uses. Commands that were submitted before may run after it.
        """
        if not self._books.acquire(blocking=False):
            self._commands.put(command)
            return
        try:
            command(self._scheduler)
            self._publish()
        except BaseException as error:  # noqa: BLE001 - the boundary, as in `_run`
            self._on_fatal(error)
        finally:
            self._books.release()
        self._commands.put(_look)

    async def stop(self) -> None:
        """End the thread after the step under way and the commands before this call."""
        self._commands.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._steps()
        except BaseException as error:  # noqa: BLE001 - the boundary: the process ends on it
            self._loop.call_soon_threadsafe(self._on_fatal, error)

    def _steps(self) -> None:
        """Run steps until told to stop."""
        is_idle = True
        while self._take_commands(wait=is_idle):
            plan = self._plan(self._scheduler.plan)
            if plan:
                self._apply(plan, self._launch(plan))
            is_idle = plan is None
            if is_idle:
                self._rest()

    def _plan(self, plan: Callable[[float], StepPlan | None]) -> StepPlan | None:
        with self._books:
            planned = plan(self._clock())
            self._publish()  # what commands and plan brought about need not wait for the step
        return planned

    def _launch(self, plan: StepPlan) -> Pending:
        return Computed(self._halves.run(plan))

    def _take_commands(self, *, wait: bool) -> bool:
        """Run the commands that are there, waiting for one if there is nothing to step; False when told to stop."""
        while wait or not self._commands.empty():
            command = self._next_command()
            if command is None:
                return False
            with self._books:
                command(self._scheduler)
            wait = False
        return True

    def _next_command(self) -> Callable[[S], None] | None:
        if self._beat is None:
            return self._commands.get()
        while True:
            try:
                return self._commands.get(timeout=self._beat.period_s)
            except queue.Empty:
                self._beat.run()

    def _apply(self, plan: StepPlan, pending: Pending) -> None:
        """Wait for the step and take in what came of it."""
        result = pending.result()
        for chunk in plan.chunks:
            error = result.failures.get(chunk.key)
            if error is not None:
                data = {"request_id": chunk.request_id, "reason": error.reason, "problem": str(error)}
                log.error("a sequence failed in a step", extra=data, exc_info=error.__cause__)
        with self._books:
            self._scheduler.apply(result, self._clock())
            self._publish(_report(plan, result))

    def _step_raised(self) -> None:
        if self._watch:
            with self._books:
                self._watch.step_raised()

    def _on_stop(self, num_layers: int, mark: Mark | None) -> None:
        assert self._watch is not None, "somebody watches"
        with self._books:
            self._watch.layers_done(num_layers, mark)
            self._publish()  # what the scheduler makes of it need not wait for the step

    def _publish(self, report: StepReport | None = None) -> None:
        events, load = self._scheduler.take_events(), self._scheduler.load()
        if report or events or load.cache_changes or load != self._load:
            self._load = replace(load, cache_changes=())
            self._loop.call_soon_threadsafe(self._deliver, News(events, report, load))


def _report(plan: StepPlan, result: StepResult) -> StepReport:
    drafts = [chunk.num_draft for chunk in plan.chunks if chunk.num_draft]
    num_drafted = sum(drafts)
    num_accepted = sum(len(tokens) - 1 for tokens in result.tokens.values()) if num_drafted else 0
    return StepReport(
        plan.num_tokens,
        result.duration_s,
        result.expert_counts,
        result.timing,
        len(drafts),
        num_drafted,
        num_accepted,
    )


def _nothing() -> None:
    """Do nothing."""


def _look(scheduler: object) -> None:
    """Let an idle engine see whether there is something to plan."""
