"""What workers could hold if they were idle: the route that a sequence takes, or why none will ever take it. Pure.

The two sides of a fleet differ: in pools, page sizes, contexts. Each limit is a worker's own, so it is asked of every
worker that is there, whoever is busy now. The routes, in order of preference:

    PAIR    a prefill worker, then a decode side (`decode` or `both`): the normal case
    BOTH    one worker of role `both`, alone: where there is no prefill worker, or none that could hold the prompt
    DECODE  one decode worker, alone: only for a sequence of which its client has output already, when no worker that
            prefills could hold what it has become
    none    refused at once; nobody waits behind it

A fleet that lacks a whole side can't be judged: its sequences wait for one (NO_WORKERS, `registry.missing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError

from headrace_router.placement.fair_queue import Client
from headrace_router.placement.prefix import NO_PREFIX, Beginnings

NO_LIMIT = 1 << 62
"""A context that never ends."""


class Route(Enum):
    """See the module."""

    PAIR = "pair"
    BOTH = "both"
    DECODE = "decode"


class Needs(Protocol):
    """What decides who could ever hold a sequence. The fields are those of `Waiting`."""

    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def num_most_tokens(self) -> int: ...  # noqa: D102
    @property
    def has_output(self) -> bool: ...  # noqa: D102


class Kind(NamedTuple):
    """Sequences for which the same workers are open; the fields are those of `Waiting`."""

    num_tokens: int
    num_most_tokens: int
    has_output: bool
    client: Client


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence in the queue."""

    num_tokens: int
    """To prefill: the prompt and what earlier attempts produced."""
    num_expected_tokens: int
    """At the end: `num_tokens` and the expected output."""
    prefix_key: int
    """Equal for prompts of the same beginning; see `prefix.prefix_key`."""
    avoid: frozenset[str] = frozenset()
    """Addresses of workers that failed it."""
    num_overtaken: int = 0
    """Sequences that came later and started earlier, on workers that it could have used."""
    num_most_tokens: int = 0
    """At the end, if nothing ends it before `max_tokens`: the context it needs. 0: not known, any context will do."""
    has_output: bool = False
    """True if its client has tokens of it already: it can't be asked to send something shorter."""
    client: Client = ()
    """Whose it is; empty: nobody's, and nothing is kept from it."""
    prefer: str = ""
    """Address of the prefill worker that has computed some of it, in an attempt or for a sample before."""
    prefer_decode: str = ""
    """Address of the decode worker that has the first of its tokens in its prefix cache."""
    num_cached_tokens: int = 0
    """How many these are. They take pages, but are not computed again."""
    most_step_s: float = math.inf
    """How long a decode side's step may take, for the gaps between its tokens to be what its client wants."""

    prefix: Beginnings = NO_PREFIX
    """Its prompt's beginnings, to be looked for in prefix caches."""

    kind: Kind = field(init=False, repr=False, compare=False)
    """What it has in common with others. Kept, because a round may look at thousands."""

    def __post_init__(self) -> None:
        """Fill in what follows from the rest."""
        object.__setattr__(self, "kind", Kind(self.num_tokens, self.num_most_tokens, self.has_output, self.client))

    @property
    def num_new_tokens(self) -> int:
        """To compute before the first new one comes."""
        return self.num_tokens - self.num_cached_tokens


@dataclass(slots=True)
class WorkerView:
    """A worker, less what the router has already promised to others.

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
    max_context_tokens: int = NO_LIMIT
    """Longest sequence, prompt and output."""
    num_slots: int = 0
    """Sequences it can run at a time."""
    holders: frozenset[Client] = frozenset()
    """Clients whose output it generates, and the addresses that they call from, as paths of one name."""
    num_lanes: int = 1
    """A sequence has pages of one of them, of which each has as many."""
    most_free_pages: int = NO_LIMIT
    """Free in one lane, as it last said."""
    step_s: float = 0.0
    """How long its steps take with what it runs now; 0: not known, or it runs nothing."""
    cached: Any = frozenset()
    """What its prefix cache has, in the terms of `Waiting.prefix`: of the router's the pages' hashes."""
    takes_prompts: bool = False
    """Of role `both` beside prefill workers: takes sequences alone that would wait for one of these (`roles`)."""

    @property
    def lane_pages(self) -> int:
        """The most pages that a sequence can ever have."""
        return self.num_pages // self.num_lanes

    def has_free(self, num_pages: int) -> bool:
        """Return whether a sequence could have so many pages now."""
        return num_pages <= self.num_free_pages and num_pages <= self.most_free_pages


@dataclass(frozen=True, slots=True)
class _Size:
    """What of a worker decides what it could hold."""

    tokens: int
    """Of its whole pool, or of a lane of it."""
    context: int

    def covers(self, other: _Size) -> bool:
        return self.tokens >= other.tokens and self.context >= other.context


def could_prefill(needs: Needs, worker: WorkerView) -> bool:
    """Return False if the worker never computes the prompt for another one, however idle."""
    return _holds_prompt(needs, worker.lane_pages * worker.page_size, worker.max_context_tokens)


def could_decode(needs: Needs, worker: WorkerView) -> bool:
    """Return False if the worker never generates for the sequence, be it that it also prefills it, however idle."""
    return _holds_output(needs, worker.lane_pages * worker.page_size, worker.max_context_tokens)


class Capacity:
    """What the workers that are there could hold. Immutable; make a new one when one comes or goes."""

    def __init__(self, workers: Iterable[WorkerView]) -> None:
        """Args: `workers` are all that are there, those that take no work at this moment included."""
        prefills: set[_Size] = set()
        boths: set[_Size] = set()
        decodes: set[_Size] = set()
        self.num_workers = 0
        for worker in workers:
            self.num_workers += 1
            kind = prefills if not worker.can_decode else boths if worker.can_prefill else decodes
            kind.add(_size(worker))
        # Sizes, not workers: a fleet of a thousand has few.
        self._prefills, self._boths, self._decodes = _largest(prefills), _largest(boths), _largest(decodes)
        self._takers = _largest({*boths, *decodes})
        self.is_colocated = not prefills
        """True if prompts are computed where output is generated."""
        self.is_complete = bool(self._takers and (prefills or boths))
        """False if it lacks a whole side."""
        has_both_route = bool(prefills) and _exceed(self._boths, self._prefills)
        has_decode_route = self.is_complete and _exceed(self._decodes, [*self._prefills, *self._boths])
        self.has_second_routes = has_both_route or has_decode_route
        """False if no sequence whatever takes another route than `first`."""
        self.first = Route.BOTH if self.is_colocated else Route.PAIR
        """The route that nearly all take."""
        self._surely = self._first_size()

    def route(self, needs: Needs) -> Route | None:
        """Return the way to go; None if there is none."""
        surely = self._surely
        if needs.num_tokens < surely.tokens and needs.num_most_tokens <= surely.context:
            return self.first
        if self.could_take(needs, Route.PAIR):
            return Route.PAIR
        if self.could_take(needs, Route.BOTH):
            return Route.BOTH
        if needs.has_output and self.is_complete and self.could_take(needs, Route.DECODE):
            return Route.DECODE
        return None

    def could_take(self, needs: Needs, route: Route) -> bool:
        """Return True if there are workers that could hold a sequence on its way, were they idle."""
        if route is Route.PAIR:
            return _any_prefills(needs, self._prefills) and _any_decodes(needs, self._takers)
        return _any_decodes(needs, self._boths if route is Route.BOTH else self._takers)

    def refusal(self, waiting: Waiting) -> HeadraceError | None:
        """Return what to tell a client whose sequence has no route; None if it has one, or if a whole side lacks.

        OverloadedError NO_FREE_PAGES if every pool is too small; UnavailableError NO_WORKERS if every context is.
        """
        if not self.is_complete or self.route(waiting) is not None:
            return None
        num_tokens, context = waiting.num_tokens, waiting.num_most_tokens
        if waiting.has_output or not (self.is_colocated or _any_decodes(waiting, self._takers)):
            return _too_small(waiting, "decode worker", self._takers, num_tokens + 1, context)
        if self.is_colocated:
            return _too_small(waiting, "worker of role both", self._boths, num_tokens + 1, context)
        return _too_small(waiting, "prefill worker", self._prefills, num_tokens, _prefill_context(waiting))

    def _first_size(self) -> _Size:
        """Return a size within which every sequence takes the first route: most do, and need no closer look."""
        if not self.is_complete:
            return _Size(0, 0)
        if self.is_colocated:
            return self._boths[0]
        prefill, taker = self._prefills[0], self._takers[0]
        return _Size(min(prefill.tokens, taker.tokens), min(prefill.context, taker.context))


def _too_small(
    waiting: Waiting, kind: str, sizes: Iterable[_Size], num_tokens: int, context: int
) -> OverloadedError | UnavailableError:
    """Return the error of a side of which no worker could hold so many tokens in so long a context."""
    fit = [size.tokens for size in sizes if size.context >= context]
    if not fit:
        longest = max(size.context for size in sizes)
        return UnavailableError(
            "NO_WORKERS",
            f"no {kind} that is there has a context of {context} tokens, prompt and output; the longest has {longest}; "
            "send the request again for an answer that fits",
        )
    remedy = "" if waiting.has_output else "send a shorter prompt, or "
    return OverloadedError(
        "NO_FREE_PAGES",
        f"{num_tokens} tokens do not fit any {kind}; the largest pool holds {max(fit)}; {remedy}run a {kind} with a "
        "larger --kv-pool-mib",
    )


def _any_prefills(needs: Needs, sizes: Iterable[_Size]) -> bool:
    return any(_holds_prompt(needs, size.tokens, size.context) for size in sizes)


def _any_decodes(needs: Needs, sizes: Iterable[_Size]) -> bool:
    return any(_holds_output(needs, size.tokens, size.context) for size in sizes)


def _holds_prompt(needs: Needs, tokens: int, context: int) -> bool:
    return needs.num_tokens <= tokens and _prefill_context(needs) <= context


def _holds_output(needs: Needs, tokens: int, context: int) -> bool:
    # At least one more token comes.
    return needs.num_tokens < tokens and needs.num_most_tokens <= context


def _prefill_context(needs: Needs) -> int:
    """Return what a prefill worker needs lest its context ends with its token, unless that is the last one anyway."""
    return min(needs.num_most_tokens, needs.num_tokens + 2)


def _size(worker: WorkerView) -> _Size:
    return _Size(worker.lane_pages * worker.page_size, worker.max_context_tokens)


def _largest(sizes: Iterable[_Size]) -> list[_Size]:
    """Return those that no other one covers, the largest pool first."""
    found: list[_Size] = []
    for size in sorted(sizes, key=lambda size: (-size.tokens, -size.context)):
        if _exceed([size], found):
            found.append(size)
    return found


def _exceed(sizes: Iterable[_Size], others: Iterable[_Size]) -> bool:
    """Return True if one of `sizes` is covered by none of `others`."""
    return not all(any(other.covers(size) for other in others) for size in sizes)
