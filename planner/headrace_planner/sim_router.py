"""The product's own book (`headrace_router.placement.book`) under a simulated clock.

What `headrace_router.requests.dispatch` and `headrace_router.fleet.worker` do with sockets is done here with numbers: a
reservation for every placement, load reports, a planning round whenever something changed.

Placement looks at every worker for every request; in Python that is about a millisecond for a thousand of them. With a
`shortlist` of n, fast fidelity shows it only the n least loaded workers of each kind, and n prefill workers that
belong to the prompt's beginning, always the same ones, so that prefix caches keep their prompts. Placement among those
is the product's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from headrace_router.placement import policy
from headrace_router.placement.book import Book
from headrace_router.placement.capacity import WorkerView
from headrace_router.placement.local_prefill import Costs, local_below
from headrace_router.placement.preferences import Preference

from headrace_planner.sim_config import WorkerSpec
from headrace_planner.sim_request import SimRequest

_BUDGET_STEPS = 2
"""As `headrace_router.fleet.worker`: one step's tokens computing, one step's waiting."""
_LOAD_STEPS = 4
_MOST_PAGES = 1 << 28
_FULL = 1 << 29
"""Added to the load of a worker that can't take more. Loads stay below 2^30, and their keys below 2^62."""
_NEVER = np.iinfo(np.int64).max


def _ignore(_: Account) -> None:
    """Nobody keeps a shortlist."""


class Reporting(Protocol):
    """A worker, as load reports show it."""

    num_pages: int
    page_tokens: int

    @property
    def num_free_pages(self) -> int:
        """Free pages now."""
        ...


@dataclass(slots=True, eq=False)
class _Reservation:
    request: SimRequest
    num_pages: int
    num_unseen: int
    num_tokens: int
    is_started: bool = False


@dataclass(slots=True, eq=False)
class Account:
    """What the router knows of one worker and has promised of it."""

    number: int
    address: str
    worker: Reporting
    spec: WorkerSpec
    can_prefill: bool
    can_decode: bool
    grows: bool
    """True if sequences take pages as they grow; else the worker's report holds them from the start."""
    is_up: bool = True
    num_unseen: int = 0
    num_tokens: int = 0
    place: int = -1
    """In the shortlist that it is on."""
    on_change: Callable[[Account], None] = _ignore
    """Told of every reservation and of what becomes of it; of `is_up` by whoever sets it."""
    _view: WorkerView | None = None
    _held: dict[int, _Reservation] = field(default_factory=dict[int, _Reservation])

    @property
    def num_held(self) -> int:
        """Sequences with a reservation."""
        return len(self._held)

    @property
    def num_free_pages(self) -> int:
        """Pages neither taken nor promised."""
        return self.worker.num_free_pages - self.num_unseen

    @property
    def num_free_slots(self) -> int:
        """Sequences it can still run."""
        return min(self.spec.max_step_sequences, self.spec.max_step_tokens) - len(self._held)

    def view(self) -> WorkerView:
        """Return what policies need to know."""
        view = self._view
        if view is None:
            view = self._view = self.view_now()
        return view

    def view_now(self) -> WorkerView:
        """Return the view, made anew; the one that policies get is as old as the worker's last report."""
        worker = self.worker
        return WorkerView(
            self.address,
            worker.page_tokens,
            worker.num_pages,
            worker.num_pages,
            worker.num_free_pages - self.num_unseen,
            _BUDGET_STEPS * self.spec.max_step_tokens,
            self.num_tokens,
            self.num_free_slots,
            self.can_prefill,
            self.can_decode,
            cached=self.worker,
        )

    def reserve(self, request: SimRequest, *, prefills: bool, decodes: bool) -> None:
        """Set aside what an attempt needs."""
        view, waiting = self.view(), request.waiting
        pages = policy.decode_pages(waiting, view) if decodes else policy.prefill_pages(waiting, view)
        tokens = waiting.num_tokens if prefills else 0
        self._held[request.key] = _Reservation(request, pages, pages, tokens)
        self._count(pages, tokens)
        self.on_change(self)

    def computed(self, key: int) -> None:
        """The prompt is computed; its pages are in the worker's report."""
        held = self._held.get(key)
        if held is not None:
            self._count(-held.num_unseen, -held.num_tokens)
            held.num_unseen = held.num_tokens = 0
            held.is_started = True
            self.on_change(self)

    def started(self, key: int) -> None:
        """The sequence runs: what it has is in the worker's report, what it will grow by is not."""
        held = self._held.get(key)
        if held is not None:
            seen = min(self._num_seen(held), held.num_unseen) if self.grows else held.num_unseen
            self._count(-seen, -held.num_tokens)
            held.num_unseen -= seen
            held.num_tokens = 0
            held.is_started = True
            self.on_change(self)

    def report(self) -> None:
        """Take a load report."""
        self._view = None
        if not self.grows:
            return
        for held in self._held.values():
            if held.is_started and held.num_unseen:
                unseen = max(0, held.num_pages - self._num_seen(held))
                self._count(unseen - held.num_unseen, 0)
                held.num_unseen = unseen

    def release(self, key: int) -> None:
        """Give a reservation back; idempotent."""
        held = self._held.pop(key, None)
        if held is not None:
            self._count(-held.num_unseen, -held.num_tokens)
            self.on_change(self)

    def _num_seen(self, held: _Reservation) -> int:
        return -(-held.request.num_tokens // self.worker.page_tokens)

    def _count(self, pages: int, tokens: int) -> None:
        self.num_unseen += pages
        self.num_tokens += tokens
        self._view = None


class Shortlist:
    """Finds the least loaded workers; among equally loaded ones those that changed longest ago.

    One number per worker: its load, then when it changed. Looking for the least among a thousand takes a microsecond.
    """

    def __init__(self, accounts: Iterable[Account], size: int, load: Callable[[Account], int]) -> None:
        self.accounts = list(accounts)
        self._size = min(size, len(self.accounts))
        self._load = load
        self._num_changes = 0
        self._loads = np.zeros(len(self.accounts), dtype=np.int64)
        for place, account in enumerate(self.accounts):
            account.place, account.on_change = place, self.touch
            self.touch(account)

    def touch(self, account: Account) -> None:
        """Take note that one of `accounts` changed."""
        self._num_changes += 1
        self._loads[account.place] = (self._load(account) << 32) + self._num_changes if account.is_up else _NEVER

    def least(self) -> list[Account]:
        """Return the least loaded workers, least first."""
        loads, places, saved = self._loads, list[int](), list[int]()
        for _ in range(self._size):
            place = int(loads.argmin())
            load = loads.item(place)
            if load == _NEVER:
                break
            places.append(place)
            saved.append(load)
            loads[place] = _NEVER
        for place, load in zip(places, saved, strict=True):
            loads[place] = load
        return [self.accounts[place] for place in places]

    def of(self, prefix: int) -> list[Account]:
        """Return the workers that belong to prompts of this beginning."""
        count = len(self.accounts)
        step = prefix // count % max(1, count - 1) + 1
        numbers = dict.fromkeys((prefix + i * step) % count for i in range(self._size))
        return [self.accounts[number] for number in numbers if self.accounts[number].is_up]


class Router:
    """Binds requests to workers by the product's book; tells `on_placed(request, prefill or None, decode)`."""

    def __init__(
        self,
        accounts: list[Account],
        on_placed: Callable[[SimRequest, Account | None, Account], None],
        on_refused: Callable[[SimRequest], None],
        *,
        now: Callable[[], float],
        shortlist: int,
        preference: Preference,
    ) -> None:
        self.accounts = accounts
        self.num_rounds = 0
        self._book: Book[SimRequest] = Book(preference)
        self._book.set_fleet(account.view_now() for account in accounts)
        self._now = now
        self._by_address = {account.address: account for account in accounts}
        can_decode = [account for account in accounts if account.can_decode]
        self._on_placed = on_placed
        self._on_refused = on_refused
        self._is_planning = False
        self._prefills: Shortlist | None = None
        self._decodes: Shortlist | None = None
        only_prefill = [a for a in accounts if a.can_prefill and not a.can_decode]
        follows = bool(only_prefill) and any(a.can_prefill for a in can_decode)  # roles are a matter of the whole fleet
        if shortlist and not follows:
            self._prefills = Shortlist(only_prefill, shortlist, _prefill_load)
            # Most free pages wins: the first few are enough.
            self._decodes = Shortlist(can_decode, max(2, shortlist // 2) if only_prefill else shortlist, _decode_load)

    def on_first_token(self, num_computed: int, after_s: float) -> None:
        """Take note of a prompt that was handed over: its first token came so long after it was placed."""
        self._book.forecast.on_first_token(num_computed, after_s)

    def local_below(self, prefill: Account, decode: Account, *, transfer_s: float, step_s: float) -> int:
        """Return how many tokens `decode` had better compute itself, as the router's dispatcher does; 0: not known."""
        start_s, token_s = self._book.forecast.prompts.parts()
        if math.isnan(start_s):
            return 0
        costs = Costs(start_s + token_s * prefill.num_tokens, token_s, transfer_s, step_s, decode.num_held)
        return local_below(costs, decode.spec.max_step_tokens)

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._book)

    def enqueue(self, request: SimRequest) -> None:
        """Queue a request at its place: retried ones keep theirs."""
        request.describe()
        self._book.add(request)
        self.kick()

    def on_fleet(self) -> None:
        """Take note that a worker ended or is back."""
        self._book.set_fleet(account.view_now() for account in self.accounts if account.is_up)

    def kick(self) -> None:
        """Plan, if anybody waits."""
        if not len(self._book) or self._is_planning:
            return
        self._is_planning = True
        while self._round() and self._prefills is not None:
            pass
        self._is_planning = False

    def _round(self) -> bool:
        self.num_rounds += 1
        for request, _ in self._book.refused():
            self._on_refused(request)
        head = next(iter(self._book), None)
        if head is None:
            return False
        placed = self._book.plan_round(self._now(), [account.view() for account in self._candidates(head)])
        for each in placed:
            prefill = self._by_address[each.prefill] if each.prefill else None
            self._on_placed(each.entry, prefill, self._by_address[each.decode])
        return bool(placed)

    def _candidates(self, head: SimRequest) -> list[Account]:
        if self._prefills is None or self._decodes is None or self._book.is_second(head):
            return [account for account in self.accounts if account.is_up]
        found = self._decodes.least()
        if self._prefills.accounts:
            found += self._prefills.least()
            found += [account for account in self._prefills.of(head.prefix) if account not in found]
        return found


def _prefill_load(account: Account) -> int:
    load = account.num_tokens * _LOAD_STEPS // (_BUDGET_STEPS * account.spec.max_step_tokens)
    return load if load < _MOST_PAGES else _MOST_PAGES


def _decode_load(account: Account) -> int:
    is_busy = account.can_prefill and account.num_tokens > account.spec.max_step_tokens
    free = account.num_free_pages
    used = _MOST_PAGES - (0 if free < 0 else free if free < _MOST_PAGES else _MOST_PAGES)
    return used + _FULL if is_busy or account.num_free_slots <= 0 else used
