"""What is promised of workers, on a simulated clock: no page twice, none forgotten, and routers that share no state."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from headrace_router.placement.book import Book
from headrace_router.placement.capacity import Waiting
from headrace_router.placement.fair_queue import Turn
from headrace_router.placement.placed import Placed
from headrace_router.placement.promises import Promises, Report, WorkerSize

PAGE, NUM_PAGES, NUM_SLOTS = 4, 60, 6
TICK_S, REPORT_TICKS = 0.01, 5


def size(address="w", *, can_prefill=True, can_decode=True) -> WorkerSize:
    return WorkerSize(address, PAGE, NUM_PAGES, 16, NUM_SLOTS, can_prefill, can_decode)


_ORDER = itertools.count()


@dataclass(eq=False)
class Entry:
    """A sequence of so many tokens, of which the router's client has some."""

    num_prompt: int
    num_output: int
    waiting: Waiting = field(init=False)
    turn: Turn = field(init=False)
    num_done: int = 0
    is_over: bool = False

    def __post_init__(self):
        self.waiting = Waiting(self.num_prompt, self.num_prompt + self.num_output, 0, client=("one",))
        self.turn = Turn(("one",), (next(_ORDER),), self.num_prompt + self.num_output)

    @property
    def num_held_tokens(self) -> int:
        return self.num_prompt + self.num_done


class Worker:
    """Computes everything itself: a queue, a pool, a token a tick. What routers hear of it are its reports."""

    def __init__(self, seed: int = 0):
        self.waiting: deque[tuple[Entry, Placed]] = deque()
        self.running: list[tuple[Entry, Placed]] = []
        self.most_waiting = 0
        self.random = random.Random(seed)

    @property
    def num_free_pages(self) -> int:
        return NUM_PAGES - sum(pages(entry) for entry, _ in self.running)

    def report(self) -> Report:
        tokens = sum(entry.num_prompt for entry, _ in self.waiting)
        return Report(self.num_free_pages, self.num_free_pages, len(self.waiting) + len(self.running), tokens)

    def tick(self) -> None:
        while self.waiting and len(self.running) < NUM_SLOTS and pages(self.waiting[0][0], 1) <= self.num_free_pages:
            entry, placed = self.waiting.popleft()
            self.running.append((entry, placed))
            placed.on_joined()
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        for entry, placed in list(self.running):
            entry.num_done += 1
            placed.on_stepped()
            if entry.num_done == entry.num_output:
                self.running.remove((entry, placed))
                entry.is_over = True
                placed.release()


def pages(entry: Entry, num_more: int = 0) -> int:
    return -(-(entry.num_held_tokens + num_more) // PAGE)


class Seen:
    """A worker as one router sees it."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.promises = Promises(size())
        self.promises.on_report(worker.report())

    def view(self, now_s: float):
        return self.promises.view()


def sequences(count: int, seed: int) -> list[Entry]:
    draw = random.Random(seed)
    return [Entry(draw.randrange(1, 40), draw.randrange(1, 60)) for _ in range(count)]


def check_account(seen: Seen, placed: list[Placed]) -> None:
    """After a report: what is free is what the pool has, less the larger of what each was promised and holds."""
    running = {entry: pages(entry) for entry, _ in seen.worker.running}
    promised = 0
    for each in placed:
        if not each.entry.is_over:
            promised += max(-(-each.entry.waiting.num_expected_tokens // PAGE), running.get(each.entry, 0))
    assert seen.promises.num_free_pages == NUM_PAGES - promised
    assert seen.promises.num_free_slots == NUM_SLOTS - sum(not each.entry.is_over for each in placed)


@pytest.mark.parametrize("seed", range(5))
def test_one_router_promises_what_there_is_and_counts_nothing_twice(seed):
    worker = Worker()
    seen, book, placed = Seen(worker), Book(), []
    book.set_fleet([seen.view(0.0)])
    entries = sequences(40, seed)
    for entry in entries:
        book.add(entry)
    for tick in range(4000):
        for each in book.plan_round(tick * TICK_S, [seen]):
            placed.append(each)
            worker.waiting.append((each.entry, each))
        worker.tick()
        assert not worker.waiting, "all that was promised was there"
        assert worker.num_free_pages >= 0
        if tick % REPORT_TICKS == 0:
            seen.promises.on_report(worker.report())
            check_account(seen, placed)
    assert all(entry.is_over for entry in entries)
    assert len(seen.promises) == seen.promises.num_tokens == seen.promises.num_unseen_pages == 0
    assert seen.view(0.0).holders == frozenset()


@pytest.mark.parametrize("seed", range(5))
def test_routers_that_share_workers_share_nothing_else_and_lose_nothing(seed):
    """What one promises the other sees with the next report: until then both may promise the same room, which waits."""
    worker = Worker()
    sides = [(Seen(worker), Book()) for _ in range(3)]
    entries = sequences(60, seed)
    for (seen, book), start in zip(sides, range(3), strict=True):
        book.set_fleet([seen.view(0.0)])
        for entry in entries[start::3]:
            book.add(entry)
    for tick in range(6000):
        num_since_report = 0
        for seen, book in sides:
            for each in book.plan_round(tick * TICK_S, [seen]):
                num_since_report += 1
                worker.waiting.append((each.entry, each))
        worker.tick()
        if tick % REPORT_TICKS == 0:
            report = worker.report()
            for seen, _ in sides:
                seen.promises.on_report(report)
                # Others' sequences are in the report, its own it knows: together they are all that there are.
                assert seen.promises.num_free_slots == NUM_SLOTS - report.num_sequences
                assert seen.promises.num_free_pages <= report.num_free_pages
    assert all(entry.is_over for entry in entries)
    assert worker.most_waiting > 0, "they promised the same room at times"
    assert worker.most_waiting <= 2 * NUM_SLOTS, "no more than the others could promise between two reports"
    for seen, _ in sides:
        assert len(seen.promises) == seen.promises.num_tokens == seen.promises.num_unseen_pages == 0


def a_pair(num_tokens: int = 20):
    prefill, decode = Promises(size("p", can_decode=False)), Promises(size("d", can_prefill=False))
    for promises in (prefill, decode):
        promises.on_report(Report(NUM_PAGES))

    @dataclass
    class Side:
        promises: Promises

        def view(self, now_s: float):
            return self.promises.view()

    entry = Entry(num_tokens, 30)
    return entry, prefill, decode, Placed(entry, Side(prefill), Side(decode))


def account(promises: Promises) -> tuple[int, int, int]:
    return NUM_PAGES - promises.num_free_pages, promises.num_tokens, NUM_SLOTS - promises.num_free_slots


def test_a_hand_off_gives_back_step_by_step():
    _, prefill, decode, placed = a_pair()
    assert (account(prefill), account(decode)) == ((5, 20, 1), (13, 0, 1))
    placed.on_prefilled()
    assert (account(prefill), account(decode)) == ((5, 0, 1), (13, 0, 1)), "pages are held until they moved"
    prefill.on_report(Report(NUM_PAGES - 5, num_sequences=1))
    decode.on_report(Report(NUM_PAGES - 5, num_sequences=1))
    assert (account(prefill)[0], account(decode)[0]) == (5, 13), "what the reports show counts once"
    placed.on_joined()
    prefill.on_report(Report(NUM_PAGES))
    assert (account(prefill), account(decode)) == ((0, 0, 0), (13, 0, 1))
    for _ in range(2):
        placed.release()
        decode.on_report(Report(NUM_PAGES))
        assert (account(prefill), account(decode)) == ((0, 0, 0), (0, 0, 0))


def test_who_ended_is_promised_nothing_by_what_comes_late():
    _, prefill, decode, placed = a_pair()
    placed.release()
    placed.on_prefilled()
    placed.on_joined()
    placed.on_stepped()
    for promises in (prefill, decode):
        promises.on_report(Report(NUM_PAGES))
        assert account(promises) == (0, 0, 0)


def test_a_report_of_before_a_promise_takes_nothing_off_it():
    entry, _, decode, placed = a_pair()
    decode.on_report(Report(NUM_PAGES))
    assert account(decode) == (13, 0, 1), "the worker has not heard of it"
    placed.on_joined()
    entry.num_done = 10
    decode.on_report(Report(NUM_PAGES - 8, num_sequences=1))
    assert account(decode) == (13, 0, 1)
    entry.num_done = 39  # more than was expected of it
    decode.on_report(Report(NUM_PAGES - 15, num_sequences=1))
    assert account(decode) == (15, 0, 1)


def test_what_others_have_in_flight_is_in_the_report_and_ones_own_counts_once():
    _, prefill, _, _ = a_pair()
    prefill.on_report(Report(NUM_PAGES, num_sequences=3, num_waiting_tokens=50))
    assert prefill.view().num_tokens_in_flight == 50, "20 of its own, 30 of others"
    prefill.on_report(Report(NUM_PAGES, num_waiting_tokens=0))
    assert prefill.view().num_tokens_in_flight == 20
