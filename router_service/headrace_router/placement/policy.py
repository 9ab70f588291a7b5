"""Where to send: which waiting sequences start now, and on which workers. Pure: no I/O, no clock, no state.

Late binding: a sequence leaves the router's queue only when a prefill worker has token budget for it and a decode
worker has pages for its prompt and expected output. The rules:

1. First come, first served. A sequence that can't start claims the workers it waits for: those it would get first.
   Nothing behind it may use them, so they empty for it; the other workers stay open to those behind. After
   `MAX_OVERTAKEN` sequences went past it on workers that it could have used, it claims every worker it could use. So
   nobody starves, however long the prompt, and nobody waits for a sequence that waits for something else.
2. A prefill worker takes a prompt if its prompt tokens in flight stay within the budget, or if it is idle. Which of
   those is for a named policy to say (`preferences`).
3. Of the decode workers with room one is chosen whose steps are as short as the sequence wants them; then the one that
   has the sequence's beginning in its prefix cache, else the one with the most free pages.
4. Workers that failed the sequence before are the last choice, not excluded: there may be no other. A prefill worker
   that computed some of it, for an attempt that failed elsewhere or another sample, is the first: its cache has it.
5. One that would wait for a prefill worker is taken alone by a worker of role `both` that helps these (`roles`). A pair
   has such a worker for its decode side only where there is no other.
6. A sequence takes the route that `Capacity` names: a pair, or one worker for all of it. A worker that could not hold
   it, were it idle, is no worker it waits for.
7. A part of each decode side is kept for clients that run nothing there. Whoever does and would need it claims nothing:
   it waits for its own to end, and those behind it of the same client wait as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace_router.placement.capacity import (
    Capacity,
    Kind,
    Needs,
    Route,
    Waiting,
    WorkerView,
    could_decode,
    could_prefill,
)
from headrace_router.placement.fair_queue import Client
from headrace_router.placement.preferences import Preference, prefix_cache

EXPECTED_OUTPUT_TOKENS = 512
"""Most output that pages are reserved for at a time; a sequence that ran out of pages reserves all it may produce."""
MAX_OVERTAKEN = 64
"""Sequences that may overtake a waiting one on workers that it could have used."""
_NO_END = 1 << 62
_FITS, _WAITS, _YIELDS, _NEVER = range(4)
"""How a worker stands to a sequence: has room now, would have room when idle, keeps its room for others, never has."""
KEPT_SLOTS = 16
"""One in so many of a decode side's slots, and one at least of two, is kept from clients that run something there."""
KEPT_PAGES = 8
"""One in so many of its pages as well. Of both half as much is kept from new names at an address that runs something:
names can be made up."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A sequence starts."""

    index: int
    """In the queue."""
    prefill: str
    """Address; empty: `decode` computes the prompt as well."""
    decode: str


class _Open:
    """Workers still open in this round, by address; assignments are taken off."""

    def __init__(self, workers: Sequence[WorkerView], fleet: Capacity, preference: Preference, turn: int) -> None:
        self.preference, self.turn = preference, turn
        self.prefills: dict[str, WorkerView] = {}
        self.decodes: dict[str, WorkerView] = {}
        for worker in workers:
            (self.decodes if worker.can_decode else self.prefills)[worker.address] = worker
        self.yielding: Waiting | None = None
        """The last that waits for others of its client alone."""
        self._held_back: dict[Client, set[str]] = {}
        """Decode sides on which no more of a client, or of all at an address, is to start."""
        # Where all of the fleet is open, what is open could hold what the fleet could.
        self._capacity = fleet if len(workers) == fleet.num_workers else None

    def decodes_for(self, client: Client) -> Collection[WorkerView]:
        """Return the decode sides on which a sequence of the client may start."""
        if not self._held_back:
            return self.decodes.values()
        held = self._held_back.get(client, set()) | self._held_back.get(client[:1], set())
        return [worker for worker in self.decodes.values() if worker.address not in held]

    def hold_back(self, waiting: Waiting, worker: WorkerView) -> None:
        """Let nothing more of a client start where its sequence yields, nor where all slots left are kept from it."""
        self.yielding, client = waiting, waiting.client
        for other in self.decodes_for(client):
            part = _kept_part(client, other)
            if other is worker or (part and other.num_free_slots <= _kept_slots(part, other)):
                self._held_back.setdefault(client if part == 1 else client[:1], set()).add(other.address)

    def close_prefill(self, address: str) -> None:
        """Leave it to those that come before."""
        del self.prefills[address]
        self._capacity = None

    def close_decode(self, address: str) -> None:
        """Leave it to those that come before."""
        del self.decodes[address]
        self._capacity = None

    def could_take(self, kind: Kind, route: Route) -> bool:
        """Return False if nothing that is open could hold such a sequence, however idle."""
        if self._held_back and not any(
            could_decode_for(kind, worker, route) for worker in self.decodes_for(kind.client)
        ):
            return False
        if self._capacity is None:
            self._capacity = Capacity((*self.prefills.values(), *self.decodes.values()))
        return self._capacity.could_take(kind, route)

    def has_room_on(self, first: Route) -> bool:
        """Return True if a sequence of the fleet's first route may find a worker."""
        if first is Route.PAIR:
            return bool(self.prefills and self.decodes)
        return any(worker.can_prefill for worker in self.decodes.values())


class _Prospects:
    """Which kinds of sequences a round passes over: those that nothing open could hold. What is closed stays so."""

    def __init__(self, capacity: Capacity, ready: _Open, kinds: Mapping[Kind, int] | None) -> None:
        self._capacity = capacity
        self._ready = ready
        self._hopeless: set[Kind] = set()
        self._left = None if kinds is None else dict(kinds)
        """How many of each kind come, of those that may have hope."""
        self._num_skipped = 0
        self._next_look = 1

    def route(self, kind: Kind) -> Route | None:
        """Return the way that the next in the queue goes; None if it is to be passed over."""
        if kind in self._hopeless:
            self._num_skipped += 1
            return None
        route = self._hope(kind)
        if route is None:
            self._num_skipped += 1
        elif self._left is not None:
            self._left[kind] = self._left.get(kind, 1) - 1
            if not self._left[kind]:
                del self._left[kind]
        return route

    def are_over(self) -> bool:
        """Return True if none that is still to come has hope, as far as is known."""
        if self._left and self._num_skipped >= self._next_look:
            self._left = {kind: count for kind, count in self._left.items() if self._hope(kind) is not None}
            # Looking takes as long as passing over so many.
            self._next_look = self._num_skipped + len(self._left)
        return self._left == {}

    def _hope(self, kind: Kind) -> Route | None:
        if kind in self._hopeless:
            return None
        route = self._capacity.route(kind)
        if route is not None and self._ready.could_take(kind, route):
            return route
        self._hopeless.add(kind)
        return None


def plan(
    queue: Iterable[Waiting],
    workers: Sequence[WorkerView],
    capacity: Capacity | None = None,
    *,
    num_second: int | None = None,
    kinds: Mapping[Kind, int] | None = None,
    preference: Preference = prefix_cache,
    turn: int = 0,
) -> list[Assignment]:
    """Choose what starts now.

    Args:
        queue: in order.
        workers: those that take work now and whose caches match.
        capacity: of the fleet that is there; by default `workers` are all of it.
        num_second: sequences in the queue that take another route than the first one. When nothing is left for the
            others, the queue is looked through for these, and no further; without the number, to its end.
        kinds: how many of each are in the queue. It is looked through no further than to the last that something
            which is still open could hold; without them, to its end.
        preference: chooses among prefill workers that are equally good.
        turn: how many were placed before this round.
    """
    capacity = capacity or Capacity(workers)
    if not capacity.is_complete:
        return []
    left = _NO_END if num_second is None and capacity.has_second_routes else num_second or 0
    ready = _Open(workers, capacity, preference, turn)
    prospects = _Prospects(capacity, ready, kinds)
    assignments: list[Assignment] = []
    for index, waiting in enumerate(queue):
        if not ready.decodes or not (left or ready.has_room_on(capacity.first)):
            break
        route = prospects.route(waiting.kind)
        if route is None:
            if prospects.are_over():
                break
            continue
        left -= route is not capacity.first
        assignment = _pair(index, waiting, ready) if route is Route.PAIR else _alone(index, waiting, ready, route)
        if assignment is not None:
            assignments.append(assignment)
        elif waiting.num_overtaken >= MAX_OVERTAKEN and waiting is not ready.yielding:
            _claim_all(waiting, ready, route)
    return assignments


def lacks_prefill(waiting: Waiting, workers: Sequence[WorkerView]) -> bool:
    """Return True if a sequence waits for a prefill worker, and has its place on a decode side."""
    prefills = [worker for worker in workers if not worker.can_decode]
    if not prefills or any(_prefill_standing(waiting, worker) == _FITS for worker in prefills):
        return False
    return any(_decode_standing(waiting, worker, Route.PAIR) == _FITS for worker in workers if worker.can_decode)


def decode_pages(waiting: Waiting, worker: WorkerView) -> int:
    """Return the pages to reserve at a decode worker: for the expected output, but no more than it can ever free."""
    expected = _num_pages(waiting.num_expected_tokens, worker)
    # Those that were never free may all be one lane's.
    usable = worker.lane_pages - (worker.num_pages - worker.num_usable_pages)
    if expected <= usable:
        return expected
    least = _num_pages(waiting.num_tokens + 1, worker)
    return min(expected, max(least, usable))


def prefill_pages(waiting: Waiting, worker: WorkerView) -> int:
    """Return the pages to reserve at a prefill worker."""
    return _num_pages(waiting.num_tokens, worker)


def _pair(index: int, waiting: Waiting, ready: _Open) -> Assignment | None:
    """Assign a prefill worker and a decode side and take what is used, or claim those the sequence waits for."""
    prefill = _best_prefill(waiting, ready)
    decode = min(ready.decodes_for(waiting.client), key=lambda worker: _decode_order(waiting, worker, Route.PAIR))
    at_prefill, at_decode = _prefill_standing(waiting, prefill), _decode_standing(waiting, decode, Route.PAIR)
    if at_prefill == at_decode == _FITS:
        ready.turn += 1
        ready.prefills[prefill.address] = _after(waiting, prefill, prefills=True, decodes=False)
        ready.decodes[decode.address] = _after(waiting, decode, prefills=False, decodes=True)
        return Assignment(index, prefill.address, decode.address)
    if at_prefill == _WAITS and (alone := _on_duty(index, waiting, ready)) is not None:
        return alone
    if at_decode == _YIELDS:
        ready.hold_back(waiting, decode)
        return None
    if at_decode == _WAITS:
        ready.close_decode(decode.address)
    if at_prefill == _WAITS:
        ready.close_prefill(prefill.address)
    return None


def _on_duty(index: int, waiting: Waiting, ready: _Open) -> Assignment | None:
    """Assign a worker that has room for prompt and output, of those that help prefill workers."""
    fit = [
        worker
        for worker in ready.decodes_for(waiting.client)
        if worker.takes_prompts and _decode_standing(waiting, worker, Route.BOTH) == _FITS
    ]
    if not fit:
        return None
    worker = min(fit, key=lambda worker: (worker.num_tokens_in_flight, _decode_order(waiting, worker, Route.BOTH)))
    ready.decodes[worker.address] = _after(waiting, worker, prefills=True, decodes=True)
    return Assignment(index, "", worker.address)


def _alone(index: int, waiting: Waiting, ready: _Open, route: Route) -> Assignment | None:
    """Assign one worker for prompt and output and take what is used, or claim the one the sequence waits for."""
    worker = min(ready.decodes_for(waiting.client), key=lambda worker: _decode_order(waiting, worker, route))
    standing = _decode_standing(waiting, worker, route)
    if standing == _FITS:
        ready.decodes[worker.address] = _after(waiting, worker, prefills=True, decodes=True)
        return Assignment(index, "", worker.address)
    if standing == _YIELDS:
        ready.hold_back(waiting, worker)
    else:
        ready.close_decode(worker.address)
    return None


def _claim_all(waiting: Waiting, ready: _Open, route: Route) -> None:
    """Close every worker that the sequence could use to those behind it, but those where it yields to others."""
    for worker in list(ready.prefills.values()):
        if could_prefill_for(waiting, worker, route):
            ready.close_prefill(worker.address)
    for worker in list(ready.decodes.values()):
        if could_decode_for(waiting, worker, route) and not _yields(waiting, worker):
            ready.close_decode(worker.address)


def could_prefill_for(waiting: Waiting, worker: WorkerView, route: Route) -> bool:
    """Return False if a worker never computes the prompt for another one on this way."""
    return route is Route.PAIR and could_prefill(waiting, worker)


def could_decode_for(needs: Needs, worker: WorkerView, route: Route) -> bool:
    """Return False if a worker never generates for the sequence on this way."""
    # On the DECODE route no worker of both roles could hold it.
    return (worker.can_prefill or route is not Route.BOTH) and could_decode(needs, worker)


def _kept_part(client: Client, worker: WorkerView) -> int:
    """Return 1 if the client runs something there, 2 if another one at its address does; else 0."""
    return 1 if client in worker.holders else 2 if client[:1] in worker.holders else 0


def _kept_slots(part: int, worker: WorkerView) -> int:
    slots = worker.num_slots // (KEPT_SLOTS * part)
    return max(slots, 1) if part == 1 and worker.num_slots > 1 else slots


def _yields(waiting: Waiting, worker: WorkerView) -> bool:
    """Return True if what the sequence needs of the worker is kept for clients that run nothing there."""
    part = _kept_part(waiting.client, worker)
    if not part:
        return False
    kept_pages = worker.num_usable_pages // (KEPT_PAGES * part)
    left = worker.num_free_pages - decode_pages(waiting, worker)
    return worker.num_free_slots <= _kept_slots(part, worker) or left < kept_pages


def _num_pages(num_tokens: int, worker: WorkerView) -> int:
    return -(-num_tokens // worker.page_size)


def _has_budget(waiting: Waiting, worker: WorkerView) -> bool:
    in_flight = worker.num_tokens_in_flight
    return in_flight == 0 or in_flight + waiting.num_new_tokens <= worker.token_budget


def _prefill_standing(waiting: Waiting, worker: WorkerView) -> int:
    if not could_prefill(waiting, worker):
        return _NEVER
    return _FITS if _has_budget(waiting, worker) and worker.has_free(prefill_pages(waiting, worker)) else _WAITS


def _decode_standing(waiting: Waiting, worker: WorkerView, route: Route) -> int:
    if not could_decode_for(waiting, worker, route):
        return _NEVER
    if _yields(waiting, worker):
        return _YIELDS
    if worker.num_free_slots <= 0 or not worker.has_free(decode_pages(waiting, worker)):
        return _WAITS
    return _FITS if route is Route.PAIR or _has_budget(waiting, worker) else _WAITS


def _best_prefill(waiting: Waiting, ready: _Open) -> WorkerView:
    equals: dict[tuple[int, bool, bool], list[WorkerView]] = {}
    for address, worker in ready.prefills.items():
        order = _prefill_standing(waiting, worker), address in waiting.avoid, address != waiting.prefer
        equals.setdefault(order, []).append(worker)
    best = equals[min(equals)]
    return best[0] if len(best) == 1 else ready.preference(waiting, best, ready.turn)


def _decode_order(waiting: Waiting, worker: WorkerView, route: Route) -> tuple[int, bool, bool, bool, bool, int, str]:
    standing, address = _decode_standing(waiting, worker, route), worker.address
    is_failed, is_slow = address in waiting.avoid, worker.step_s > waiting.most_step_s
    is_other = address != waiting.prefer_decode
    return standing, is_failed, is_slow, is_other, worker.takes_prompts, -worker.num_free_pages, address


def _after(waiting: Waiting, worker: WorkerView, *, prefills: bool, decodes: bool) -> WorkerView:
    pages = decode_pages(waiting, worker) if decodes else prefill_pages(waiting, worker)
    holders, client = worker.holders, waiting.client
    if decodes and client and client not in holders:
        holders |= {client, client[:1]}
    # Written out: `replace` takes seven times as long, and this is done twice per placement.
    return WorkerView(
        worker.address,
        worker.page_size,
        worker.num_pages,
        worker.num_usable_pages,
        worker.num_free_pages - pages,
        worker.token_budget,
        worker.num_tokens_in_flight + (waiting.num_new_tokens if prefills else 0),
        worker.num_free_slots - (1 if decodes else 0),
        worker.can_prefill,
        worker.can_decode,
        worker.max_context_tokens,
        worker.num_slots,
        holders,
        worker.num_lanes,
        worker.most_free_pages,
        worker.step_s,
        worker.cached,
        worker.takes_prompts,
    )
