"""A worker's engine loop under a simulated clock, around the product's own schedulers.

The loop is `headrace_core.engine.engine`'s: commands between steps, plan, step, apply, publish. The step takes the
time that the model of step times says; tokens are made up. With `unit_tokens` above 1 the same prefill scheduler works
in units of so many tokens, one page each, which is what makes long prompts cheap at fast fidelity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

from headrace_core.batch.scheduler import Scheduler
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, StepPlan, StepResult
from headrace_core.batch.step_book import Failed, FetchReady
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_decode.events import DecodeEvent, Output, PagesReady, Started
from headrace_decode.scheduler import DecodeScheduler
from headrace_prefill.events import Admitted, Prefilled, PrefillEvent, Sealed
from headrace_prefill.scheduler import PrefillScheduler

from headrace_planner.sim_clock import Clock
from headrace_planner.sim_config import WorkerSpec
from headrace_planner.sim_host import Host, HostJob
from headrace_planner.sim_request import SimRequest
from headrace_planner.step_times import StepShape, StepTimes

_LIMITS = ModelLimits(vocab_size=1 << 60, max_context_tokens=1 << 60, eos_token_ids=())
_NO_LIMIT = 1 << 30
_TOKEN = SampledToken(-1)
_NEWEST = 0.2
"""As `headrace_router.fleet.session`: weight of the newest step."""

S = TypeVar("S", bound=Scheduler[Any])


class PrefillFlow(Protocol):
    """What a prefill worker tells the simulation."""

    def on_prefilled(self, key: int, num_cached: int) -> None:
        """Take the end of a prompt; called once per key."""
        ...

    def on_refused(self, key: int) -> None:
        """Take a failure: the worker can't hold it."""
        ...

    def on_report(self, worker: int) -> None:
        """Take note that the worker's load changed."""
        ...


class DecodeFlow(Protocol):
    """What a decode or colocated worker tells the simulation. Times are simulated seconds."""

    def on_pages_ready(self, key: int) -> None:
        """Begin the transfer of a handed-off sequence."""
        ...

    def on_started(self, key: int, num_cached: int) -> None:
        """Take note that the sequence joined the batch."""
        ...

    def on_token(self, key: int, at_s: float, *, is_last: bool) -> None:
        """Take a token computed at `at_s`."""
        ...

    def on_more_tokens(self, key: int, count: int, at_s: float, *, is_last: bool) -> None:
        """Take `count` tokens whose gaps `on_gaps` has told; the last was computed at `at_s`."""
        ...

    def on_gaps(self, gap_s: float, count: int, begin_s: float, num_steps: int) -> None:
        """Take `count` gaps between tokens of some sequences, which came with `num_steps` steps from `begin_s` on."""
        ...

    def on_refused(self, key: int) -> None:
        """Take a failure: the worker can't hold it."""
        ...

    def on_report(self, worker: int) -> None:
        """Take note that the worker's load changed."""
        ...


class Engine(Generic[S]):
    """One scheduler and its loop. `busy_s`, `num_steps`, `num_tokens` accumulate."""

    def __init__(
        self, clock: Clock, scheduler: S, step_s: Callable[[StepPlan], float], publish: Callable[[], None], host: Host
    ) -> None:
        self.scheduler = scheduler
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_tokens = 0
        self.step_s = 0.0
        """Of the last steps, a mean, as routers keep it."""
        self._clock = clock
        self._step_s = step_s
        self._publish = publish
        self._host = host
        self._commands: list[Callable[[S], None]] = []
        self._plan: StepPlan | None = None
        self._job: HostJob | None = None
        self._is_looping = False

    def submit(self, command: Callable[[S], None]) -> None:
        """Run `command` on the scheduler between two steps."""
        self._commands.append(command)
        if self._plan is None and not self._is_looping:
            self._loop()

    def kill(self) -> None:
        """Forget the step under way and every command."""
        self._commands.clear()
        if self._job is not None:
            self._host.cancel(self._job)
        self._plan = self._job = None

    def _loop(self) -> None:
        self._is_looping = True
        while True:
            commands, self._commands = self._commands, []
            for command in commands:
                command(self.scheduler)
            plan = self.scheduler.plan(self._clock.now_s)
            if plan is not None:
                break
            self._publish()
            if not self._commands:
                self._is_looping = False
                return
        self._is_looping = False
        self._plan = plan
        self._job = self._host.start(self._step_s(plan), self._end, len(plan.chunks))

    def _end(self, duration_s: float) -> None:
        plan, self._plan, self._job = self._plan, None, None
        assert plan is not None, "a step ended that never began"
        self.busy_s += duration_s
        self.step_s += _NEWEST * (duration_s - self.step_s) if self.num_steps else duration_s
        self.num_steps += 1
        self.num_tokens += plan.num_tokens
        tokens = {chunk.key: [_TOKEN] for chunk in plan.chunks if chunk.is_sampled}
        self._is_looping = True
        self.scheduler.apply(StepResult(tokens, duration_s), self._clock.now_s)
        self._publish()
        self._loop()


class PrefillWorker:
    """The product's prefill scheduler on a simulated worker, with one token or one block of tokens as its unit."""

    def __init__(
        self,
        number: int,
        spec: WorkerSpec,
        clock: Clock,
        flow: PrefillFlow,
        *,
        host: Host,
        unit_tokens: int,
        block_tokens: int,
    ) -> None:
        self.number = number
        self.step_s = 0.0  # it generates nothing
        self._times: StepTimes = spec.times
        self._clock = clock
        self._flow = flow
        self._unit, self._block = unit_tokens, block_tokens
        self._requests: dict[int, SimRequest] = {}
        page_size = 1 if unit_tokens > 1 else spec.page_size
        pages = lanes_of(spec, page_size, unit_tokens)
        scheduler = PrefillScheduler(
            pages,
            _LIMITS,
            max_step_tokens=max(1, spec.max_step_tokens // unit_tokens),
            max_step_sequences=spec.max_step_sequences,
            max_waiting_sequences=_NO_LIMIT,
        )
        self.num_pages, self.page_tokens, self.num_lanes = pages.num_pages, page_size * unit_tokens, pages.num_lanes
        self.engine: Engine[PrefillScheduler] = Engine(clock, scheduler, self._step_s, self._publish, host)

    @property
    def num_free_pages(self) -> int:
        """As a load report has it."""
        return self.engine.scheduler.pages.num_available

    @property
    def most_free_pages(self) -> int:
        """Of a lane, likewise."""
        return self.engine.scheduler.pages.most_available

    def num_cached_tokens(self, request: SimRequest) -> int:
        """Return how many of a request's tokens its prefix cache has; as a router knows that hears of it at once."""
        return self.engine.scheduler.pages.num_cached_tokens(request.token_ids(self._block, self._unit)) * self._unit

    def add(self, request: SimRequest) -> None:
        """Queue an attempt."""
        key, now_s = request.key, self._clock.now_s
        self._requests[key] = request
        spec = spec_of(request, request.token_ids(self._block, self._unit))
        self.engine.submit(lambda scheduler: scheduler.add(key, spec, now_s))

    def free(self, key: int) -> None:
        """Give an attempt's pages back, whatever its state."""
        self._requests.pop(key, None)
        self.engine.submit(lambda scheduler: scheduler.free(key))

    def kill(self) -> None:
        """End the worker's process."""
        self.engine.kill()

    def check_integrity(self) -> None:
        """Assert that no page is lost."""
        self.engine.scheduler.check_integrity()

    def _step_s(self, plan: StepPlan) -> float:
        shape = StepShape()
        for chunk in plan.chunks:
            request, start = self._requests.get(chunk.key), chunk.start * self._unit
            count = len(chunk.token_ids) * self._unit
            if request is not None and start + count > request.num_to_prefill:
                count = max(1, request.num_to_prefill - start)
            shape.add_chunk(start, count, chunk.lane, self._times.pairs_of(start, count))
        return self._times.step_s(shape)

    def _publish(self) -> None:
        events: Sequence[PrefillEvent] = self.engine.scheduler.take_events()
        self._flow.on_report(self.number)
        for event in events:
            match event:
                case Prefilled(key=key, num_cached_tokens=num_cached):
                    self._flow.on_prefilled(key, num_cached * self._unit)
                case Failed(key=key):
                    self._requests.pop(key, None)
                    self._flow.on_refused(key)
                case Admitted() | Sealed() | FetchReady():
                    pass


class ExactDecodeWorker:
    """The product's decode scheduler on a simulated worker, step by step; also colocated."""

    def __init__(self, number: int, spec: WorkerSpec, clock: Clock, flow: DecodeFlow, *, host: Host) -> None:
        self.number = number
        pages = lanes_of(spec, spec.page_size)
        self.num_pages, self.page_tokens, self.num_lanes = pages.num_pages, spec.page_size, pages.num_lanes
        self._times: StepTimes = spec.times
        self._clock = clock
        self._flow = flow
        scheduler = DecodeScheduler(
            pages,
            _LIMITS,
            max_step_tokens=spec.max_step_tokens,
            max_step_sequences=spec.max_step_sequences,
            max_waiting_sequences=_NO_LIMIT,
        )
        self.engine: Engine[DecodeScheduler] = Engine(clock, scheduler, self._step_s, self._publish, host)

    @property
    def num_free_pages(self) -> int:
        """As a load report has it."""
        return self.engine.scheduler.pages.num_available

    def num_cached_tokens(self, request: SimRequest) -> int:
        """Return 0: workers that generate do not tell what they have cached."""
        del request
        return 0

    @property
    def most_free_pages(self) -> int:
        """Of a lane, likewise."""
        return self.engine.scheduler.pages.most_available

    @property
    def num_running(self) -> int:
        """As a load report has it."""
        return self.engine.scheduler.load().num_running

    @property
    def step_s(self) -> float:
        """How long its last steps took; 0 while it runs nothing."""
        return self.engine.step_s if self.num_running else 0.0

    def add(self, request: SimRequest, block_tokens: int, *, has_handoff: bool) -> None:
        """Queue an attempt; with `has_handoff` its pages come by transfer, and one token with them."""
        key, now_s = request.key, self._clock.now_s
        spec = spec_of(request, request.token_ids(block_tokens, 1))
        self.engine.submit(lambda scheduler: scheduler.add(key, spec, now_s, has_handoff=has_handoff))

    def arrived(self, key: int) -> None:
        """Join a sequence whose pages arrived."""
        self.engine.submit(lambda scheduler: scheduler.arrived(key, -1))

    def abort(self, key: int) -> None:
        """Forget an attempt; nothing lands in its pages any more."""

        def command(scheduler: DecodeScheduler) -> None:
            scheduler.abort(key)
            scheduler.drained(key)

        self.engine.submit(command)

    def kill(self) -> None:
        """End the worker's process."""
        self.engine.kill()

    def check_integrity(self) -> None:
        """Assert that no page is lost."""
        self.engine.scheduler.check_integrity()

    def _step_s(self, plan: StepPlan) -> float:
        shape = StepShape()
        for chunk in plan.chunks:
            if _is_row(chunk):
                shape.num_rows += 1
                shape.context_tokens += chunk.start + 1
            else:
                count = len(chunk.token_ids)
                shape.add_chunk(chunk.start, count, chunk.lane, self._times.pairs_of(chunk.start, count))
        return self._times.step_s(shape)

    def _publish(self) -> None:
        now_s, flow = self._clock.now_s, self._flow
        events: Sequence[DecodeEvent] = self.engine.scheduler.take_events()
        flow.on_report(self.number)
        for event in events:
            match event:
                case Output(key=key, finish=finish):
                    flow.on_token(key, now_s, is_last=finish is not None)
                case PagesReady(key=key):
                    flow.on_pages_ready(key)
                case Started(key=key, num_cached_tokens=num_cached):
                    flow.on_started(key, num_cached)
                case Failed(key=key):
                    flow.on_refused(key)
                case _:
                    pass  # pre-empted: it comes back by itself


def lanes_of(spec: WorkerSpec, page_size: int, unit_tokens: int = 1) -> PageAllocator:
    """Return a worker's pages, of so many units of so many tokens: lanes of as many each, at least one."""
    num_pages = spec.num_pages * spec.page_size // (page_size * unit_tokens)
    return PageAllocator(max(1, num_pages // spec.groups) * spec.groups, page_size, num_lanes=spec.groups)


def spec_of(request: SimRequest, token_ids: list[int]) -> SequenceSpec:
    """Return the attempt as schedulers take it."""
    # Prompt and output are told apart by `num_prompt_tokens`; in units, only the sum of both matters.
    num_prompt = min(len(token_ids), request.num_prompt)
    return SequenceSpec("simulated", request.attempt, 0, token_ids, num_prompt, _params(request.num_output))


@lru_cache
def _params(num_output: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_output, ignore_eos=True, seed=0)


def _is_row(chunk: Chunk) -> bool:
    return len(chunk.token_ids) == 1 and chunk.start > 0 and chunk.is_sampled
