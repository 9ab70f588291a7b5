"""What one worker last said of its load, and what it was promised since that it can't have said yet. Pure: no clock.

    a promise:  MADE ── the worker has the sequence's pages ──► STARTED ── over there, whatever the reason ──► ended

Free pages are the last report's, less every promise as far as the report can't know it: all of it until the sequence
has started there, then its expected growth. The same goes for prompt tokens in flight and for places of sequences: what
others use, be it another router, is in the report; what was promised here is known here. So routers that share workers
need to share nothing else: what one promises the others see with the next report, and until then two of them may
promise the same room, which the worker's own queue takes.

The router has one for each worker that it is connected to, the simulator one for each that it simulates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from headrace_router.placement.capacity import NO_LIMIT, Waiting, WorkerView
from headrace_router.placement.fair_queue import Client
from headrace_router.placement.policy import decode_pages, prefill_pages

_BUDGET_STEPS = 2
"""Steps of prompt tokens that a worker may have in flight: one computing, one waiting."""


class Grows(Protocol):
    """A sequence, as a promise sees it."""

    @property
    def num_held_tokens(self) -> int:
        """Tokens that a worker which has started it has pages for."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerSize:
    """What never changes of a worker."""

    address: str
    page_size: int
    num_pages: int
    max_step_tokens: int
    max_step_sequences: int
    can_prefill: bool
    can_decode: bool
    max_context_tokens: int = NO_LIMIT
    num_lanes: int = 1

    @property
    def num_slots(self) -> int:
        """Sequences that it runs at a time: a step has a token at least for each."""
        return min(self.max_step_sequences, self.max_step_tokens)


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of its load."""

    num_free_pages: int
    most_free_pages: int = NO_LIMIT
    """In one lane."""
    num_sequences: int = 0
    """That run or wait."""
    num_waiting_tokens: int = 0
    """Prompt tokens that it has still to compute."""


@dataclass(slots=True, eq=False)
class Promise:
    """What one sequence may use of one worker."""

    owner: Grows
    client: Client
    """Whose output it generates here; empty: nobody's."""
    num_pages: int
    num_unseen_pages: int
    """The part that the last report does not show."""
    num_tokens: int
    """Prompt tokens in flight; 0 once they are computed."""
    is_started: bool = False
    """True when the worker has allocated the sequence's pages."""


def _ignore(_: Promises) -> None:
    """Nobody looks."""


class Promises:
    """Those of one worker, as long as it is the same process at the same address."""

    def __init__(self, size: WorkerSize, *, on_change: Callable[[Promises], None] = _ignore) -> None:
        """Args: `on_change` is told of every change."""
        self.size = size
        self.report = Report(0)
        self.num_unseen_pages = 0
        """Of all promises."""
        self.num_tokens = 0
        self._on_change = on_change
        self._promises: dict[Promise, None] = {}
        self._growing: dict[Promise, None] = {}
        """Those that started, and of which a part is unseen."""
        self._held: dict[Client, int] = {}
        """Promises by client, and by its address."""
        self._holders: frozenset[Client] | None = frozenset()
        """Of `_held`, the keys; None while they are to be taken again."""
        self._num_usable_pages = 0
        self._num_foreign_tokens = 0
        self._num_foreign_sequences = 0

    def __len__(self) -> int:
        return len(self._promises)

    @property
    def num_free_pages(self) -> int:
        """Pages neither taken nor promised; below 0 where more was promised than there is."""
        return self.report.num_free_pages - self.num_unseen_pages

    @property
    def num_free_slots(self) -> int:
        """Sequences that it can still run."""
        return self.size.num_slots - len(self._promises) - self._num_foreign_sequences

    def make(self, owner: Grows, waiting: Waiting, *, prefills: bool, decodes: bool) -> Promise:
        """Set aside what a sequence needs here until `end`."""
        view = self.view()
        pages = decode_pages(waiting, view) if decodes else prefill_pages(waiting, view)
        tokens = waiting.num_new_tokens if prefills else 0
        promise = Promise(owner, waiting.client if decodes else (), pages, pages, tokens)
        self._promises[promise] = None
        for path in _paths(promise.client):
            self._held[path] = self._held.get(path, 0) + 1
            if self._held[path] == 1:
                self._holders = None
        self._count(pages, tokens)
        return promise

    def start(self, promise: Promise) -> None:
        """The worker has the sequence's pages: its next report shows what it holds."""
        if promise in self._promises and not promise.is_started:
            promise.is_started = True
            self._growing[promise] = None

    def compute(self, promise: Promise) -> None:
        """The worker has computed its prompt."""
        if promise in self._promises and promise.num_tokens:
            tokens, promise.num_tokens = promise.num_tokens, 0
            self._count(0, -tokens)

    def end(self, promise: Promise) -> None:
        """Give it back; idempotent."""
        if promise not in self._promises:
            return
        del self._promises[promise]
        self._growing.pop(promise, None)
        for path in _paths(promise.client):
            self._held[path] -= 1
            if not self._held[path]:
                del self._held[path]
                self._holders = None
        self._count(-promise.num_unseen_pages, -promise.num_tokens)

    def on_report(self, report: Report) -> None:
        """Take what the worker says now."""
        self.report = report
        self._num_usable_pages = max(self._num_usable_pages, report.num_free_pages)
        for promise in list(self._growing):
            num_seen = -(-promise.owner.num_held_tokens // self.size.page_size)
            unseen = max(0, promise.num_pages - num_seen)
            self.num_unseen_pages += unseen - promise.num_unseen_pages
            promise.num_unseen_pages = unseen
            if not unseen:
                del self._growing[promise]
        self._num_foreign_tokens = max(0, report.num_waiting_tokens - self.num_tokens)
        self._num_foreign_sequences = max(0, report.num_sequences - len(self._promises))
        self._on_change(self)

    def view(self, *, is_probed: bool = False, step_s: float = 0.0, cached: Any = frozenset()) -> WorkerView:
        """Return what policies need to know.

        Args:
            is_probed: it is to get one sequence, and no other before that one is over.
            step_s: how long its steps take.
            cached: what its prefix cache has.
        """
        size, num_free_slots = self.size, self.num_free_slots
        if self._holders is None:
            self._holders = frozenset(self._held)
        return WorkerView(
            address=size.address,
            page_size=size.page_size,
            num_pages=size.num_pages,
            num_usable_pages=self._num_usable_pages,
            num_free_pages=self.num_free_pages,
            num_lanes=size.num_lanes,
            most_free_pages=self.report.most_free_pages,
            token_budget=0 if is_probed else _BUDGET_STEPS * size.max_step_tokens,  # of an idle one: a prompt
            num_tokens_in_flight=self.num_tokens + self._num_foreign_tokens,
            num_free_slots=min(num_free_slots, 1) if is_probed else num_free_slots,
            can_prefill=size.can_prefill,
            can_decode=size.can_decode,
            max_context_tokens=size.max_context_tokens,
            num_slots=size.num_slots,
            holders=self._holders,
            step_s=step_s,
            cached=cached,
        )

    def _count(self, pages: int, tokens: int) -> None:
        self.num_unseen_pages += pages
        self.num_tokens += tokens
        self._on_change(self)


def _paths(client: Client) -> list[Client]:
    """Return a client and the address that it calls from."""
    return list({client, client[:1]}) if client else []
