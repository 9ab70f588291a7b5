"""The queue: samples wait here, and nowhere else, until `policy.plan` binds them to workers.

A planning round runs once at the end of a loop tick in which anything changed: a sample came, a worker reported,
a reservation ended. Samples stay in order of arrival; one that is retried takes its old place.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from dataclasses import dataclass, replace

from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError

from headrace_router import policy
from headrace_router.policy import Assignment, Waiting
from headrace_router.registry import Registry
from headrace_router.sample import Sample
from headrace_router.worker import Reservation, Worker

_MISSING_CHECK_S = 0.25


class Placement:
    """The workers of one attempt and what is reserved of them."""

    def __init__(self, sample: Sample, prefill: Worker | None, decode: Worker, waiting: Waiting) -> None:
        self.prefill = prefill
        self.decode = decode
        self._on_prefill: Reservation | None = None
        if prefill is not None:
            self._on_prefill = prefill.reserve(sample, waiting, prefills=True, decodes=False)
        self._on_decode = decode.reserve(sample, waiting, prefills=prefill is None, decodes=True)

    def on_prefilled(self) -> None:
        """The prompt is computed; its pages are still held."""
        if self._on_prefill is not None:
            self._on_prefill.num_prefill_tokens = 0
            self._on_prefill.is_started = True

    def on_started(self) -> None:
        """The decode worker runs it; the prefill worker is free of it."""
        self._on_decode.num_prefill_tokens = 0
        self._on_decode.is_started = True
        if self.prefill is not None and self._on_prefill is not None:
            self.prefill.release(self._on_prefill)

    def release(self) -> None:
        """Give everything back; idempotent."""
        if self.prefill is not None and self._on_prefill is not None:
            self.prefill.release(self._on_prefill)
        self.decode.release(self._on_decode)


@dataclass(slots=True, eq=False)
class _Entry:
    sample: Sample
    waiting: Waiting
    placed: asyncio.Future[Placement]
    since_s: float


class Dispatcher:
    """Binds samples to workers. Event loop only."""

    def __init__(self, registry: Registry, *, no_workers_timeout_s: float) -> None:
        self._registry = registry
        self._no_workers_timeout_s = no_workers_timeout_s
        self._queue: list[_Entry] = []
        self._is_round_due = False
        self._missing_since_s: float | None = None
        self._missing_timer: asyncio.TimerHandle | None = None
        registry.listeners.append(self.kick)

    async def place(self, sample: Sample) -> Placement:
        """Wait until workers are free for `sample`, and reserve them.

        Raises:
            UnavailableError: NO_WORKERS, none were there for too long; says what is missing.
            OverloadedError: NO_FREE_PAGES, no worker can ever hold it.
        """
        entry = _Entry(sample, sample.waiting(), asyncio.get_running_loop().create_future(), time.monotonic())
        insort(self._queue, entry, key=_order)
        self.kick()
        self._watch_missing()
        try:
            return await entry.placed
        except asyncio.CancelledError:
            if entry.placed.done() and not entry.placed.cancelled() and entry.placed.exception() is None:
                entry.placed.result().release()
                self.kick()
            raise
        finally:
            if entry in self._queue:
                self._queue.remove(entry)

    def kick(self) -> None:
        """Plan again at the end of this tick."""
        if self._queue and not self._is_round_due:
            self._is_round_due = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._is_round_due = False
        workers = {worker.address: worker for worker in self._registry.workers()}
        if not workers or not self._queue:
            return
        self._refuse_impossible(workers)
        views = [worker.view() for worker in workers.values()]
        assignments = policy.plan((entry.waiting for entry in self._queue), views)
        self._count_overtaken(assignments)
        placed: list[_Entry] = []
        for assignment in assignments:
            entry = self._queue[assignment.index]
            placed.append(entry)
            if entry.placed.done():
                continue
            prefill = workers[assignment.prefill] if assignment.prefill else None
            placement = Placement(entry.sample, prefill, workers[assignment.decode], entry.waiting)
            entry.placed.set_result(placement)
        for entry in placed:
            self._queue.remove(entry)

    def _count_overtaken(self, assignments: list[Assignment]) -> None:
        if not assignments:
            return
        placed = {assignment.index for assignment in assignments}
        num_behind = len(placed)
        for index, entry in enumerate(self._queue[: max(placed)]):
            if index in placed:
                num_behind -= 1
            else:
                num_overtaken = entry.waiting.num_overtaken + num_behind
                entry.waiting = replace(entry.waiting, num_overtaken=num_overtaken)

    def _refuse_impossible(self, workers: dict[str, Worker]) -> None:
        """Fail the head of the queue if no pool is large enough for it, however empty."""
        views = [worker.view() for worker in workers.values()]
        while self._queue:
            waiting = self._queue[0].waiting
            if any(policy.can_ever_fit(waiting, view) for view in views if view.can_decode):
                return
            if not any(view.can_decode for view in views):
                return
            entry = self._queue.pop(0)
            most = max(view.num_pages * view.page_size for view in views if view.can_decode)
            message = f"{waiting.num_tokens} tokens do not fit any decode worker; the largest pool holds {most}"
            _fail(entry, OverloadedError("NO_FREE_PAGES", message))

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
            for entry in list(self._queue):
                if max(entry.since_s, self._missing_since_s) <= limit_s:
                    self._queue.remove(entry)
                    _fail(entry, UnavailableError("NO_WORKERS", missing))
        if self._queue:
            self._watch_missing()
        else:
            self._missing_since_s = None


def _order(entry: _Entry) -> tuple[float, int]:
    return entry.sample.order


def _fail(entry: _Entry, error: HeadraceError) -> None:
    if not entry.placed.done():
        entry.placed.set_exception(error)
