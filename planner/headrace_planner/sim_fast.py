"""A decode or colocated worker that jumps over steps in which nothing happens: fast fidelity.

Between two events (a command, a sequence's end, a prompt chunk) the batch does not change, and its steps take times
that rise evenly with the context: a span of n steps is one event. A command shortens the span under way to the next
step boundary, so commands take effect exactly when `headrace_core.engine.engine` lets them. Admitting a handed-off
sequence changes no batch before its pages arrive, so it leaves the span alone: only its transfer begins, when the step
after the boundary ends.

What differs from the product's decode scheduler, and from exact fidelity: a sequence gets the pages of its whole
output when it is admitted, so nothing is pre-empted; a colocated prompt's pages are blocks of the workload's size.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace_core.batch.step_budget import StepBudget
from headrace_core.kv.sequence_pages import SequencePages

from headrace_planner.sim_clock import Clock
from headrace_planner.sim_config import WorkerSpec
from headrace_planner.sim_engine import DecodeFlow, lanes_of
from headrace_planner.sim_request import SimRequest
from headrace_planner.step_times import StepShape

_NO_PAGES = SequencePages(-1)
"""Of a row whose pages are only counted, or not taken yet."""


@dataclass(slots=True, eq=False)
class _Row:
    """`num_context` tokens were attended to in the step before `since_step`."""

    key: int
    num_left: int
    num_prompt: int
    has_handoff: bool
    units: list[int]
    pages: SequencePages
    num_pages: int
    num_computed: int = 0
    since_step: int = 0
    num_context: int = 0


@dataclass(slots=True)
class _Span:
    """`num_steps` steps from `start_s` on; step i takes `first_s + i · slope_s`."""

    start_s: float
    num_steps: int
    first_s: float
    slope_s: float
    chunks: list[tuple[_Row, int]] = field(default_factory=list[tuple[_Row, int]])

    def duration_s(self, num_steps: int) -> float:
        """Return the seconds of the first `num_steps`."""
        return num_steps * self.first_s + self.slope_s * num_steps * (num_steps - 1) / 2

    def steps_until(self, elapsed_s: float) -> float:
        """Return the steps, and the part of a step, that `elapsed_s` seconds have room for."""
        half = self.slope_s / 2
        linear = self.first_s - half
        if abs(half) * self.num_steps < 1e-12:
            return elapsed_s / max(self.first_s, 1e-12)
        square = linear * linear + 4 * half * elapsed_s
        return ((math.sqrt(square) if square > 0 else 0.0) - linear) / (2 * half)


class FastDecodeWorker:
    """See the module. The interface is `sim_engine.ExactDecodeWorker`'s."""

    def __init__(
        self, number: int, spec: WorkerSpec, clock: Clock, flow: DecodeFlow, *, unit_tokens: int, is_colocated: bool
    ) -> None:
        self.number = number
        self.step_s = 0.0  # nobody asks
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_tokens = 0
        self.page_tokens = unit_tokens
        # Pages of handed-off sequences are only counted, as if all lanes had them, and those of the few that a decode
        # worker prefills itself.
        self._pages = lanes_of(spec, 1, unit_tokens) if is_colocated else None
        self.num_pages = (
            self._pages.num_pages if self._pages else max(1, spec.num_pages * spec.page_size // unit_tokens)
        )
        self.num_lanes = self._pages.num_lanes if self._pages else 1
        self._spec = spec
        self._times = spec.times
        self._clock = clock
        self._flow = flow
        self._max_running = min(spec.max_step_sequences, spec.max_step_tokens)
        self._num_owned = 0
        self._commands: list[Callable[[], None]] = []
        self._waiting: deque[_Row] = deque()
        self._moving: dict[int, _Row] = {}
        self._prompts: dict[int, _Row] = {}
        self._rows: dict[int, _Row] = {}
        self._fresh: list[_Row] = []
        self._ready: list[int] = []
        self._ends: list[tuple[int, int]] = []
        self._context = 0
        self._span: _Span | None = None
        self._version = 0
        self._is_looping = False

    @property
    def num_free_pages(self) -> int:
        """As a load report has it."""
        pages = self._pages
        return (self.num_pages if pages is None else pages.num_available) - self._num_owned

    @property
    def most_free_pages(self) -> int:
        """Of a lane, likewise."""
        return self.num_free_pages if self._pages is None else self._pages.most_available

    def num_cached_tokens(self, request: SimRequest) -> int:
        """Return 0: workers that generate do not tell what they have cached."""
        del request
        return 0

    def add(self, request: SimRequest, block_tokens: int, *, has_handoff: bool) -> None:
        """Queue an attempt; with `has_handoff` its pages come by transfer, and one token with them."""
        units = [] if has_handoff or self._pages is None else request.token_ids(block_tokens, self.page_tokens)
        num_pages = -(-(request.num_to_prefill + request.num_left) // self.page_tokens)
        num_pages = min(self.num_pages // self.num_lanes, num_pages)
        num_left = request.num_left - has_handoff
        row = _Row(request.key, num_left, request.num_to_prefill, has_handoff, units, _NO_PAGES, num_pages=num_pages)
        span = self._span
        if has_handoff and span is not None and span.num_steps > 1:
            self._waiting.append(row)
            self._admit()
            ready, self._ready = self._ready, []
            for key in ready:
                self._clock.at(span.start_s + span.duration_s(self._next_boundary(span) + 1), self._tell_ready, key)
        else:
            self._submit(lambda: self._waiting.append(row))

    def arrived(self, key: int) -> None:
        """Join a sequence whose pages arrived."""
        self._submit(lambda: self._join_arrived(key))

    def abort(self, key: int) -> None:
        """Forget an attempt; nothing lands in its pages any more."""
        self._submit(lambda: self._abort(key))

    def kill(self) -> None:
        """End the worker's process; tokens of steps that were complete are out."""
        if self._span is not None and not self._span.chunks:
            elapsed_s = self._clock.now_s - self._span.start_s
            done = min(self._span.num_steps, int(self._span.steps_until(elapsed_s) + 1e-9))
            if done:
                self._advance(self._span, done)
        for row in self._rows.values():
            if self.num_steps > row.since_step:
                count = self.num_steps - row.since_step
                self._flow.on_more_tokens(row.key, count, self._clock.now_s, is_last=False)
        self._commands.clear()
        self._version += 1
        self._span = None

    def check_integrity(self) -> None:
        """Assert that an idle worker has all its pages."""
        rows = [*self._moving.values(), *self._prompts.values(), *self._rows.values()]
        assert self._num_owned == sum(row.num_pages for row in rows if self._is_counted(row)), "pages are lost"
        if self._pages is not None:
            self._pages.check_integrity()

    def _submit(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if self._span is not None:
            self._shorten(self._span)
        elif not self._is_looping:
            self._loop()

    def _shorten(self, span: _Span) -> None:
        if span.num_steps == 1:
            return
        steps = self._next_boundary(span)
        if steps < span.num_steps:
            span.num_steps = steps
            self._schedule(span)

    def _next_boundary(self, span: _Span) -> int:
        """Return how many steps of the span will be complete when the one under way is."""
        return max(1, math.ceil(span.steps_until(self._clock.now_s - span.start_s) - 1e-9))

    def _tell_ready(self, key: int) -> None:
        self._flow.on_report(self.number)
        self._flow.on_pages_ready(key)

    def _schedule(self, span: _Span) -> None:
        self._version += 1
        end_s, now_s = span.start_s + span.duration_s(span.num_steps), self._clock.now_s
        self._clock.at(end_s if end_s > now_s else now_s, self._end, self._version)

    def _loop(self) -> None:
        self._is_looping = True
        while True:
            commands, self._commands = self._commands, []
            for command in commands:
                command()
            self._admit()
            if self._rows or self._prompts:
                break
            self._publish()
            if not self._commands:
                self._is_looping = False
                return
        self._is_looping = False
        self._begin()

    def _begin(self) -> None:
        rows, step_s, context = len(self._rows), self._times.step_s, self._context
        chunks = self._take_chunks() if self._prompts else []
        shape = StepShape(rows, context)
        for row, count in chunks:
            pairs = self._times.pairs_of(row.num_computed, count)
            shape.add_chunk(row.num_computed, count, row.pages.lane, pairs)
        first_s = step_s(shape)
        slope_s, steps = 0.0, 1
        if not (chunks or self._ready):
            ends = self._ends
            while ends[0][1] not in self._rows:
                heapq.heappop(ends)
            steps = ends[0][0] - self.num_steps
            if steps > 1:
                last_s = step_s(StepShape(rows, context + rows * (steps - 1)))
                slope_s = (last_s - first_s) / (steps - 1)
        self._span = _Span(self._clock.now_s, steps, first_s, slope_s, chunks)
        self._schedule(self._span)

    def _take_chunks(self) -> list[tuple[_Row, int]]:
        """Decode rows come first, then prompts while the token budget lasts: as `headrace_decode.scheduler`."""
        chunks: list[tuple[_Row, int]] = []
        work = ((row.pages.lane, row.num_prompt - row.num_computed) for row in self._prompts.values())
        budget = StepBudget(self._spec.max_step_tokens - len(self._rows), work)
        for row in self._prompts.values():
            lane = row.pages.lane
            count = min(budget.left(lane), row.num_prompt - row.num_computed)
            if count > 0:
                chunks.append((row, count))
                budget.take(lane, count)
        return chunks

    def _end(self, version: int) -> None:
        if version != self._version or self._span is None:
            return
        span, self._span = self._span, None
        self._is_looping = True
        self._advance(span, span.num_steps)
        for row, count in span.chunks:
            row.num_computed += count
            self.num_tokens += count
            if row.num_computed >= row.num_prompt:
                self._finish_prompt(row)
        self._publish()
        self._loop()

    def _advance(self, span: _Span, num_steps: int) -> None:
        """Give every row `num_steps` tokens."""
        num_rows, fresh, duration_s = len(self._rows), self._fresh, span.duration_s(num_steps)
        self.num_steps += num_steps
        self.num_tokens += num_rows * num_steps
        self.busy_s += duration_s
        self._context += num_rows * num_steps
        regular = num_rows * num_steps - len(fresh)
        if regular:
            self._flow.on_gaps(duration_s / num_steps, regular, span.start_s, num_steps)
        self._fresh = []
        for row in fresh:
            row.num_left -= 1
            row.since_step += 1
            row.num_context += 1
            if not row.num_left:
                self._drop(row)
            self._flow.on_token(row.key, span.start_s + span.first_s, is_last=not row.num_left)
        while self._ends and self._ends[0][0] <= self.num_steps:
            row = self._rows.get(heapq.heappop(self._ends)[1])
            if row is not None:
                self._drop(row)
                self._flow.on_more_tokens(row.key, row.num_left, self._clock.now_s, is_last=True)

    def _finish_prompt(self, row: _Row) -> None:
        del self._prompts[row.key]
        if self._pages is not None:
            self._pages.commit(row.pages, row.units, len(row.units))
        self._flow.on_token(row.key, self._clock.now_s, is_last=row.num_left == 1)
        row.num_left -= 1
        if row.num_left:
            self._join(row)
        else:
            self._give_back(row)

    def _join_arrived(self, key: int) -> None:
        row = self._moving.pop(key, None)
        if row is not None:
            self._join(row)
            self._fresh.append(row)
            self._flow.on_started(key, 0)

    def _join(self, row: _Row) -> None:
        row.since_step, row.num_context = self.num_steps, row.num_prompt + 1
        self._rows[row.key] = row
        self._context += row.num_context
        heapq.heappush(self._ends, (self.num_steps + row.num_left, row.key))

    def _drop(self, row: _Row) -> None:
        """Take a row out of the batch."""
        del self._rows[row.key]
        self._context -= row.num_context + self.num_steps - row.since_step
        self._give_back(row)

    def _admit(self) -> None:
        running = len(self._rows) + len(self._prompts) + len(self._moving)
        while self._waiting and running < self._max_running:
            row = self._waiting[0]
            if not self._reserve(row):
                return
            self._waiting.popleft()
            running += 1
            if row.has_handoff:
                self._moving[row.key] = row
                self._ready.append(row.key)
            else:
                self._prompts[row.key] = row
                self._flow.on_started(row.key, row.num_computed)

    def _reserve(self, row: _Row) -> bool:
        if self._pages is None or row.has_handoff:
            if row.num_pages > self.num_free_pages:
                return False
            self._num_owned += row.num_pages
            return True
        # For its output, too; and a lane has its part of what is only counted.
        num_kept = row.num_pages - len(row.units) - (-self._num_owned // self.num_lanes)
        pages = self._pages.admit(row.key, row.units, num_kept=lambda _: num_kept)
        if pages is None:
            return False
        row.pages = pages
        row.num_computed = min(len(pages.nodes) * self.page_tokens, row.num_prompt - 1)
        self._pages.reserve(row.pages, row.num_pages)
        return True

    def _is_counted(self, row: _Row) -> bool:
        return self._pages is None or row.has_handoff

    def _give_back(self, row: _Row) -> None:
        if self._pages is None or row.has_handoff:
            self._num_owned -= row.num_pages
        else:
            self._pages.free(row.pages)

    def _abort(self, key: int) -> None:
        row = self._moving.pop(key, None) or self._prompts.pop(key, None)
        if row is not None:
            self._give_back(row)
        elif key in self._rows:
            self._fresh = [row for row in self._fresh if row.key != key]
            self._drop(self._rows[key])
        else:
            self._waiting = deque(row for row in self._waiting if row.key != key)

    def _publish(self) -> None:
        ready, self._ready = self._ready, []
        self._flow.on_report(self.number)
        for key in ready:
            self._flow.on_pages_ready(key)
