"""Where to send: which waiting sequences start now, and on which workers. Pure: no I/O, no clock, no state.

Late binding: a sequence leaves the router's queue only when a prefill worker has token budget for it and a decode
worker has pages for its prompt and expected output. The rules:

1. First come, first served. A sequence that can't start claims the workers it waits for: those it would get first.
   Nothing behind it may use them, so they empty for it; the other workers stay open to those behind. After
   `MAX_OVERTAKEN` sequences went past it, nothing does any more. So nobody starves, however long the prompt.
2. A prefill worker takes a prompt if its prompt tokens in flight stay within the budget, or if it is idle. The least
   loaded one is chosen; among equals the one that prompts of the same beginning also get, for its prefix cache.
3. The decode worker with the most free pages is chosen.
4. Workers that failed the sequence before are the last choice, not excluded: there may be no other.
5. Pairs are disaggregated whenever there is a prefill worker and a decode side (`decode` or `both`). Otherwise `both`
   workers are used colocated: prompt and output on one worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

EXPECTED_OUTPUT_TOKENS = 512
"""Most output that pages are reserved for at first; a sequence that ran out of pages reserves all it may produce."""
MAX_OVERTAKEN = 64
"""Sequences that may overtake a waiting one."""
_AFFINITY_TOKENS = 64
"""Prompt tokens that decide which prefill worker's cache a prompt belongs to."""
_LOAD_STEPS = 4
"""Loads are equal when they are the same quarter of a prefill worker's budget."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence in the queue."""

    num_tokens: int
    """To prefill: the prompt and what earlier attempts produced."""
    num_expected_tokens: int
    """At the end: `num_tokens` and the expected output."""
    prefix_key: int
    """Equal for prompts of the same beginning; see `prefix_key`."""
    avoid: frozenset[str] = frozenset()
    """Addresses of workers that failed it."""
    num_overtaken: int = 0
    """Sequences that came later and started earlier."""


@dataclass(slots=True)
class WorkerView:
    """A worker that takes work, less what the router has already promised to others.

    A value, changed by nobody; not frozen, because routers make one per worker and change, and that costs eight times.
    """

    address: str
    page_size: int
    num_pages: int
    """In its pool."""
    num_usable_pages: int
    """Most that were ever free."""
    num_free_pages: int
    token_budget: int
    """Prompt tokens it may have in flight."""
    num_tokens_in_flight: int
    num_free_slots: int
    """Sequences it can still run."""
    can_prefill: bool
    can_decode: bool


@dataclass(frozen=True, slots=True)
class Assignment:
    """A sequence starts."""

    index: int
    """In the queue."""
    prefill: str
    """Address; empty: colocated on `decode`."""
    decode: str


@dataclass(slots=True)
class _Open:
    """Workers still open in this round, by address; assignments are taken off."""

    prefills: dict[str, WorkerView]
    decodes: dict[str, WorkerView]


def prefix_key(token_ids: Sequence[int]) -> int:
    """Return a number that is equal for equal first tokens."""
    return xxhash.xxh3_64_intdigest(repr(token_ids[:_AFFINITY_TOKENS]).encode())


def is_colocated(workers: Iterable[WorkerView]) -> bool:
    """Return True if prompts are computed where output is generated (rule 5)."""
    return not any(worker.can_prefill and not worker.can_decode for worker in workers)


def plan(queue: Iterable[Waiting], workers: Sequence[WorkerView]) -> list[Assignment]:
    """Choose what starts now.

    Args:
        queue: in order of arrival.
        workers: those that take work and whose caches match.
    """
    colocated = is_colocated(workers)
    if colocated:
        ready = _Open({}, {worker.address: worker for worker in workers if worker.can_prefill})
    else:
        ready = _Open(
            {worker.address: worker for worker in workers if not worker.can_decode},
            {worker.address: worker for worker in workers if worker.can_decode},
        )
    assignments: list[Assignment] = []
    for index, waiting in enumerate(queue):
        if not ready.decodes or not (colocated or ready.prefills):
            break
        assignment = _place(index, waiting, ready, colocated)
        if assignment is not None:
            assignments.append(assignment)
        elif waiting.num_overtaken >= MAX_OVERTAKEN:
            break
    return assignments


def _place(index: int, waiting: Waiting, ready: _Open, colocated: bool) -> Assignment | None:
    """Assign the sequence and take what it uses, or claim the workers it waits for."""
    decode = min(ready.decodes.values(), key=lambda worker: _decode_order(waiting, worker, colocated))
    decode_fits = _has_room(waiting, worker=decode) and (not colocated or _has_budget(waiting, decode))
    if colocated:
        if not decode_fits:
            del ready.decodes[decode.address]
            return None
        ready.decodes[decode.address] = _after(waiting, decode, prefills=True, decodes=True)
        return Assignment(index, "", decode.address)
    prefill = min(ready.prefills.values(), key=lambda worker: _prefill_order(waiting, worker))
    prefill_fits = _can_prefill(waiting, prefill)
    if decode_fits and prefill_fits:
        ready.prefills[prefill.address] = _after(waiting, prefill, prefills=True, decodes=False)
        ready.decodes[decode.address] = _after(waiting, decode, prefills=False, decodes=True)
        return Assignment(index, prefill.address, decode.address)
    if not decode_fits:
        del ready.decodes[decode.address]
    if not prefill_fits:
        del ready.prefills[prefill.address]
    return None


def decode_pages(waiting: Waiting, worker: WorkerView) -> int:
    """Return the pages to reserve at a decode worker: for the expected output, but no more than it can ever free."""
    expected = _num_pages(waiting.num_expected_tokens, worker)
    if expected <= worker.num_usable_pages:
        return expected
    least = _num_pages(waiting.num_tokens + 1, worker)
    return min(expected, max(least, worker.num_usable_pages))


def prefill_pages(waiting: Waiting, worker: WorkerView) -> int:
    """Return the pages to reserve at a prefill worker."""
    return _num_pages(waiting.num_tokens, worker)


def can_ever_fit(waiting: Waiting, worker: WorkerView) -> bool:
    """Return False if the sequence is larger than the worker's whole pool."""
    return _num_pages(waiting.num_tokens + 1, worker) <= worker.num_pages


def _num_pages(num_tokens: int, worker: WorkerView) -> int:
    return -(-num_tokens // worker.page_size)


def _has_budget(waiting: Waiting, worker: WorkerView) -> bool:
    in_flight = worker.num_tokens_in_flight
    return in_flight == 0 or in_flight + waiting.num_tokens <= worker.token_budget


def _can_prefill(waiting: Waiting, worker: WorkerView) -> bool:
    return _has_budget(waiting, worker) and worker.num_free_pages >= prefill_pages(waiting, worker)


def _has_room(waiting: Waiting, worker: WorkerView) -> bool:
    return worker.num_free_slots > 0 and worker.num_free_pages >= decode_pages(waiting, worker)


def _prefill_order(waiting: Waiting, worker: WorkerView) -> tuple[bool, bool, int, int]:
    load = worker.num_tokens_in_flight * _LOAD_STEPS // max(worker.token_budget, 1)
    affinity = xxhash.xxh3_64_intdigest(worker.address.encode(), seed=waiting.prefix_key)
    return not _can_prefill(waiting, worker), worker.address in waiting.avoid, load, affinity


def _decode_order(waiting: Waiting, worker: WorkerView, colocated: bool) -> tuple[bool, bool, int, str]:
    lacks = not _has_room(waiting, worker) or (colocated and not _has_budget(waiting, worker))
    return lacks, worker.address in waiting.avoid, -worker.num_free_pages, worker.address


def _after(waiting: Waiting, worker: WorkerView, *, prefills: bool, decodes: bool) -> WorkerView:
    pages = decode_pages(waiting, worker) if decodes else prefill_pages(waiting, worker)
    # Written out: `replace` takes seven times as long, and this is done twice per placement.
    return WorkerView(
        worker.address,
        worker.page_size,
        worker.num_pages,
        worker.num_usable_pages,
        worker.num_free_pages - pages,
        worker.token_budget,
        worker.num_tokens_in_flight + (waiting.num_tokens if prefills else 0),
        worker.num_free_slots - (1 if decodes else 0),
        worker.can_prefill,
        worker.can_decode,
    )
