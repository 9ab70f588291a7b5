"""The queue: samples wait here, and nowhere else, until the book (`placement/book.py`) binds them to workers.

A planning round runs once at the end of a loop tick in which anything changed: a sample came, a worker reported,
a reservation ended. Clients share the queue fairly (`fair_queue`), each one's samples go by priority, then by when
their first token is due, and one that is retried takes its old place. One that no worker could ever hold, of those that
are there, is refused at once: in the round after it came, or after the fleet changed. So is one whose target can't be
met: when it comes, by what is forecast, or when its first token would be late.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace_core.door import RETRY_AFTER_S
from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError

from headrace_router.fleet.registry import Registry
from headrace_router.fleet.session import LastTransfer
from headrace_router.fleet.worker import Worker
from headrace_router.placement.book import Book
from headrace_router.placement.capacity import Waiting
from headrace_router.placement.early_rejection import judge
from headrace_router.placement.fair_queue import Turn
from headrace_router.placement.local_prefill import Costs, local_below
from headrace_router.placement.placed import Placed
from headrace_router.placement.preferences import Preference, prefix_cache
from headrace_router.requests.sample import Sample

_MISSING_CHECK_S = 0.25
_MOST_RETRY_S = 30.0


class Placement:
    """The workers of one attempt and what is promised of them; `on_change` is called when it becomes less."""

    def __init__(
        self,
        placed: Placed[_Entry, Worker],
        on_change: Callable[[], None],
        on_first_token: Callable[[int, float], None],
    ) -> None:
        self.prefill = placed.prefill
        self.decode = placed.decode
        self._placed = placed
        self._on_change = on_change
        self._on_first_token = on_first_token
        self._since_s = time.monotonic()
        for worker in self._workers():
            worker.breaker.on_start(self, self._since_s)

    @property
    def num_prefill_tokens(self) -> int:
        """Of its prompt, that a prefill worker has still to compute."""
        return self._placed.num_prefill_tokens

    def on_prefilled(self, num_computed: int) -> None:
        """The prompt is computed; its pages are still held there, and reserved where they go."""
        now_s = time.monotonic()
        self._on_first_token(num_computed, now_s - self._since_s)
        if self.prefill is not None:
            self.prefill.breaker.on_success(now_s)
            self._placed.on_prefilled()
            self._on_change()

    def on_joined(self, transfer: LastTransfer | None) -> None:
        """The decode worker runs it; the prefill worker is free of it."""
        self.decode.last_transfer = transfer or self.decode.last_transfer
        self._placed.on_joined()
        if self.prefill is not None:
            self.prefill.breaker.on_over(self)
            self._on_change()

    def on_stepped(self, num_computed: int) -> None:
        """The decode worker computed its first token, or the first one of any."""
        now_s = time.monotonic()
        self.decode.breaker.on_success(now_s)
        self._placed.on_stepped()
        if self.prefill is None:
            self._on_first_token(num_computed, now_s - self._since_s)
            self._on_change()

    def release(self) -> None:
        """Give everything back; idempotent."""
        self._placed.release()
        for worker in self._workers():
            worker.breaker.on_over(self)
        self._on_change()

    def _workers(self) -> Sequence[Worker]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


@dataclass(slots=True, eq=False)
class _Entry:
    sample: Sample
    waiting: Waiting
    placed: asyncio.Future[Placement]
    since_s: float
    late: asyncio.TimerHandle | None = None
    """Refuses it when its first token can't come in time any more."""

    @property
    def turn(self) -> Turn:
        """See `fair_queue.HasTurn`."""
        return self.sample.turn

    @property
    def num_held_tokens(self) -> int:
        """See `promises.Grows`."""
        return self.sample.num_tokens

    def settle(self) -> None:
        """Wait no more."""
        if self.late is not None:
            self.late.cancel()


class Dispatcher:
    """Binds samples to workers. Event loop only."""

    def __init__(
        self, registry: Registry, *, no_workers_timeout_s: float, preference: Preference = prefix_cache
    ) -> None:
        self._registry = registry
        self._no_workers_timeout_s = no_workers_timeout_s
        self._book: Book[_Entry, Worker] = Book(preference, is_gone=lambda entry: entry.placed.done())
        self._fleet: list[Worker] = []
        self._is_round_due = False
        self._missing_since_s: float | None = None
        self._missing_timer: asyncio.TimerHandle | None = None
        registry.listeners.append(self.kick)

    async def place(self, sample: Sample) -> Placement:
        """Wait until workers are free for `sample`, and reserve them.

        Raises:
            UnavailableError: NO_WORKERS, none were there for too long, or none with its context; says what is missing.
            OverloadedError: NO_FREE_PAGES, no worker that is there could ever hold it; SLO_UNREACHABLE.
        """
        entry = _Entry(sample, sample.waiting(), asyncio.get_running_loop().create_future(), time.monotonic())
        self._check_targets(entry)
        self._book.add(entry)
        self.kick()
        self._watch_missing()
        try:
            return await entry.placed
        except asyncio.CancelledError:
            if entry.placed.done() and not entry.placed.cancelled() and entry.placed.exception() is None:
                entry.placed.result().release()
            raise
        finally:
            entry.settle()
            self._book.remove(entry)

    def local_below(self, placement: Placement) -> int | None:
        """Return how many tokens its decode worker had better compute itself; None: too little was measured yet."""
        prefill, decode, line = placement.prefill, placement.decode, self._book.forecast.prompts
        transfer = decode.last_transfer
        if prefill is None or transfer is None or not transfer.bytes_per_s or not line.is_known:
            return None
        start_s, token_s = line.parts()
        own, now_s = placement.num_prefill_tokens, time.monotonic()
        start_s += token_s * max(0, prefill.view(now_s).num_tokens_in_flight - own)
        transfer_s = decode.layout.page_bytes / decode.layout.page_size / transfer.bytes_per_s
        costs = Costs(start_s, token_s, transfer_s, decode.view(now_s).step_s, decode.load.num_running)
        return local_below(costs, decode.info.max_step_tokens)

    def kick(self) -> None:
        """Plan again at the end of this tick."""
        if len(self._book) and not self._is_round_due:
            self._is_round_due = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._is_round_due = False
        fleet, now_s = self._registry.ready(), time.monotonic()
        if fleet != self._fleet:
            self._fleet = list(fleet)
            self._book.set_fleet(worker.view(now_s) for worker in fleet)
        for entry, error in self._book.refused():
            _fail(entry, error)
        if not len(self._book):
            return
        for placed in self._book.plan_round(now_s, self._registry.workers()):
            entry = placed.entry
            entry.settle()
            entry.placed.set_result(Placement(placed, self.kick, self._book.forecast.on_first_token))

    def _check_targets(self, entry: _Entry) -> None:
        """Refuse whose targets can't be met, or see to it that it is refused when they can't be met any more.

        Raises:
            OverloadedError: SLO_UNREACHABLE.
        """
        now_s, due_s = time.monotonic(), entry.sample.due_s
        views = [worker.view(now_s) for worker in self._registry.ready()]
        verdict = judge(self._book, entry, views, due_s=due_s, now_s=now_s)
        if verdict.problem:
            raise _unreachable(verdict.problem, verdict.late_s)

        def on_late() -> None:
            if entry in self._book:
                self._book.remove(entry)
                _fail(entry, _unreachable("it has waited until its first token would come too late", RETRY_AFTER_S))

        if verdict.start_by_s < math.inf:
            entry.late = asyncio.get_running_loop().call_later(verdict.start_by_s - now_s, on_late)

    def _watch_missing(self) -> None:
        """Keep a timer running while somebody waits."""
        if self._missing_timer is None:
            self._missing_timer = asyncio.get_running_loop().call_later(_MISSING_CHECK_S, self._check_missing)

    def _check_missing(self) -> None:
        self._missing_timer = None
        missing = self._registry.missing()
        now_s = time.monotonic()
        if not missing:
            self._missing_since_s = None
        elif self._missing_since_s is None:
            self._missing_since_s = now_s
        if self._missing_since_s is not None:
            limit_s = now_s - self._no_workers_timeout_s
            for entry in list(self._book):
                if max(entry.since_s, self._missing_since_s) <= limit_s:
                    self._book.remove(entry)
                    _fail(entry, UnavailableError("NO_WORKERS", missing))
        if len(self._book):
            self._watch_missing()
        else:
            self._missing_since_s = None


def _unreachable(problem: str, retry_s: float) -> OverloadedError:
    retry_s = min(max(retry_s, RETRY_AFTER_S), _MOST_RETRY_S)
    return OverloadedError("SLO_UNREACHABLE", f"{problem}; ask again in {retry_s:.1f} s", retry_after_s=retry_s)


def _fail(entry: _Entry, error: HeadraceError) -> None:
    entry.settle()
    if not entry.placed.done():
        entry.placed.set_exception(error)
