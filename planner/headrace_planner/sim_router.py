"""The product's own book (`headrace_router.placement.book`) under a simulated clock.

What `headrace_router.requests.dispatch` and `headrace_router.fleet.worker` do with sockets is done here with numbers:
load reports, and a planning round whenever something changed. What is promised of workers is the product's own account.

Placement looks at every worker for every request; in Python that is about a millisecond for a thousand of them. With a
`shortlist` of n, fast fidelity shows it only the n least loaded workers of each kind, and n prefill workers that
belong to the prompt's beginning, always the same ones, so that prefix caches keep their prompts. Placement among those
is the product's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from headrace_router.placement.book import Book
from headrace_router.placement.capacity import WorkerView
from headrace_router.placement.early_rejection import judge
from headrace_router.placement.local_prefill import Costs, local_below
from headrace_router.placement.placed import Placed
from headrace_router.placement.preferences import PREFERENCES
from headrace_router.placement.promises import Promises, Report, WorkerSize

from headrace_planner.sim_clock import Clock
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_request import SimRequest

_LOAD_STEPS = 4
_MOST_PAGES = 1 << 28
_FULL = 1 << 29
"""Added to the load of a worker that can't take more. Loads stay below 2^30, and their keys below 2^62."""
_NEVER = np.iinfo(np.int64).max


class Reporting(Protocol):
    """A worker, as load reports show it."""

    num_pages: int
    page_tokens: int
    num_lanes: int

    @property
    def step_s(self) -> float:
        """How long its last steps took; 0 if it runs nothing, or that is not asked."""
        ...

    @property
    def num_free_pages(self) -> int:
        """Free pages now."""
        ...

    @property
    def most_free_pages(self) -> int:
        """Free pages now of the lane that has most."""
        ...


class Account:
    """What the router knows of one worker and has promised of it."""

    def __init__(
        self, number: int, address: str, worker: Reporting, spec: WorkerSpec, *, can_prefill: bool, can_decode: bool
    ) -> None:
        self.number = number
        self.address = address
        self.worker = worker
        self.spec = spec
        self.is_up = True
        self.place = -1
        """In the shortlist that it is on."""
        self.on_change: Callable[[Account], None] = lambda account: None
        """Told of every change of its promises, and of its reports; of `is_up` by whoever sets it."""
        size = WorkerSize(
            address, worker.page_tokens, worker.num_pages, spec.max_step_tokens, spec.max_step_sequences,
            can_prefill, can_decode, num_lanes=worker.num_lanes,
        )  # fmt: skip
        self.promises = Promises(size, on_change=self._changed)
        self._view: WorkerView | None = None
        self.report()

    @property
    def can_prefill(self) -> bool:
        """Whether it computes prompts."""
        return self.promises.size.can_prefill

    @property
    def can_decode(self) -> bool:
        """Whether it generates."""
        return self.promises.size.can_decode

    def view(self, now_s: float = 0.0) -> WorkerView:
        """Return what policies need to know."""
        del now_s  # nothing here is a matter of time
        view = self._view
        if view is None:
            view = self._view = self.promises.view(cached=self.worker, step_s=self.worker.step_s)
        return view

    def report(self) -> None:
        """Take a load report."""
        self.promises.on_report(Report(self.worker.num_free_pages, self.worker.most_free_pages))

    def _changed(self, _: Promises) -> None:
        self._view = None
        self.on_change(self)


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
    """Binds requests to workers by the product's book; tells `on_placed` of each."""

    def __init__(
        self,
        accounts: list[Account],
        on_placed: Callable[[Placed[SimRequest, Account]], None],
        on_refused: Callable[[SimRequest], None],
        *,
        clock: Clock,
        shortlist: int,
        config: SimConfig,
    ) -> None:
        self.accounts = accounts
        self.num_rounds = 0
        self._book: Book[SimRequest, Account] = Book(PREFERENCES[config.placement])
        self._book.set_fleet(account.view() for account in accounts)
        self._clock = clock
        self._ttft_target_s = config.ttft_target_s
        self._itl_target_s = config.itl_target_s
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

    def local_below(self, placed: Placed[SimRequest, Account], num_running: int, step_s: float, wire: Wire) -> int:
        """Return how many tokens its decode worker had better compute itself, as the router's dispatcher does.

        0: nothing was measured yet, or there is no prefill worker.
        """
        start_s, token_s = self._book.forecast.prompts.parts()
        if math.isnan(start_s) or placed.prefill is None:
            return 0
        start_s += token_s * (placed.prefill.promises.num_tokens - placed.num_prefill_tokens)
        transfer_s = wire.bytes_per_token * (1 - wire.overlap) / wire.bandwidth + wire.latency_per_token_s
        costs = Costs(start_s, token_s, transfer_s, step_s, num_running)
        return local_below(costs, placed.decode.spec.max_step_tokens)

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._book)

    def enqueue(self, request: SimRequest) -> None:
        """Queue a request at its place: retried ones keep theirs. One whose target is out of reach is refused."""
        request.describe(most_step_s=self._itl_target_s)
        if request.attempt or self._ttft_target_s == self._itl_target_s == math.inf:
            self._book.add(request)
        else:
            now_s, due_s = self._clock.now_s, request.arrival_s + self._ttft_target_s
            views = [account.view() for account in self.accounts if account.is_up]
            verdict = judge(self._book, request, views, due_s=due_s, now_s=now_s)
            if verdict.problem:
                self._on_refused(request)
                return
            self._book.add(request)
            if verdict.start_by_s < math.inf:
                self._clock.at(verdict.start_by_s, self._give_up, request)
        self.kick()

    def _give_up(self, request: SimRequest) -> None:
        if not request.attempt and request in self._book:
            self._book.remove(request)
            self._on_refused(request)

    def on_fleet(self) -> None:
        """Take note that a worker ended or is back."""
        self._book.set_fleet(account.view() for account in self.accounts if account.is_up)

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
        placed = self._book.plan_round(self._clock.now_s, self._candidates(head))
        for each in placed:
            self._on_placed(each)
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
    load = account.promises.num_tokens * _LOAD_STEPS // account.view().token_budget
    return load if load < _MOST_PAGES else _MOST_PAGES


def _decode_load(account: Account) -> int:
    promises = account.promises
    is_busy = account.can_prefill and promises.num_tokens > account.spec.max_step_tokens
    free = promises.num_free_pages
    used = _MOST_PAGES - (0 if free < 0 else free if free < _MOST_PAGES else _MOST_PAGES)
    return used + _FULL if is_busy or promises.num_free_slots <= 0 else used
