"""What the model of the hand-off is about: two attempts at one sequence, their holder, their takers, their router.

The sequence has two pages. The first is full, so the holder's prefix cache keeps it and others may share it; the second
depends on the tokens that are known. It has two output tokens: the holder computes the first, the taker the second; if
one was known before, the holder's token is the last. The holder's pool has as many pages as a sequence, and so has each
taker's: whoever is next has the pages of the one before. Event loop and engine's thread of a process meet at queues.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial
from operator import attrgetter
from typing import Any

from headrace_core.transfer.states import LEASE_MOVES, TAKE_MOVES, LeaseEvent, TakeEvent

from .explore import Step, Wrong

LEASE = {(state.value, event): after.value for (state, event), after in LEASE_MOVES.items()}
TAKE = {(state.value, event): after.value for (state, event), after in TAKE_MOVES.items()}
"""The product's tables, with states as words."""

NUM_PAGES = NUM_TOKENS = 2
FREE, CACHED, STRANGER = 0, -1, -2
"""Who has a page, if not attempt 1 or 2."""

GUARDS = {
    "generation": "the holder compares generations, before each frame and when the taker confirms",
    "last look": "the holder compares generations when the taker confirms",
    "lease": "only pages of a lease that is held are shown",
    "incarnation": "a read names the process that it means",
    "token hash": "what was computed, and what is asked for, is compared by its hash",
    "checksum": "what arrived is compared with what was sealed",
    "quarantine": "pages under transfer are set aside until it is drained",
    "drain": "the taking ends only when no byte can land",
    "drain to the end": "a transfer that failed is drained, however its sequence ends meanwhile",
    "never begun": "pages are given back of which the loop had yet to hear",
    "attempt at the holder": "an order of a lower attempt is refused",
    "attempt at the router": "entries of another attempt are dropped",
    "position": "an entry is taken at its position alone",
    "references": "a cached page is evicted only if nobody uses it",
    "sealed in time": "a run whose lease is over is not published",
    "silence": "who says nothing for ten seconds is given up",
    "confirm": "a lease ends by the taker's word, not when all is sealed",
    "last heard": "a lease whose first token is the last ends by the taker's word, too",
}
"""What the product does so that nothing goes wrong; the model can do without one."""

FAULTS = {
    "cancel": "the client cancels",
    "deadline": "the sequence's time is up",
    "session lost": "the router loses its session with the first taker",
    "taker dies": "the first taker's process dies and another one starts",
    "taker hangs": "the first taker's process stops, its connections stand",
    "holder restarts": "the holder's process dies and another one starts",
    "step fails": "a step of the holder fails, after pages were sealed",
    "bytes flip": "bytes flip on their way",
    "transfer times out": "a transfer fails while its bytes are under way",
    "other order": "between taker and holder an order becomes another one",
    "freed behind": "a page is freed though its lease lives: an error of ours",
    "entry twice": "an entry comes twice",
    "entry lost": "an entry is lost",
    "entry garbled": "an entry comes of which the router can make nothing",
}


@dataclass(frozen=True)
class World:
    """One set-up: which taker each attempt is at, which transport is one-sided, how many of which faults happen."""

    name: str
    takers: tuple[int, int] = (0, 0)
    is_one_sided: tuple[bool, bool] = (False, False)
    faults: tuple[str, ...] = ()
    num_faults: int = 1
    has_others: bool = True
    """Whether other sequences take pages at the holder, and share the cached one."""
    without: str = ""
    """The guard that is missing."""

    def has(self, guard: str) -> bool:
        assert guard in GUARDS, guard
        return guard != self.without


@dataclass(slots=True)
class Router:
    state: str = "running"
    attempt: int = 0
    num_known: int = 0


@dataclass(slots=True)
class Others:
    """Faults that may still happen, and other sequences at the holder."""

    num_faults: int
    happened: tuple[str, ...] = ()
    num_reuses: int = 1
    num_shares: int = 1
    page_id: int = -1
    """Which page another sequence has for itself."""
    shared_id: int = -1
    """Which cached page another sequence uses."""


@dataclass(slots=True)
class Holder:
    incarnation: int = 1
    num_leases: int = 0
    pages: tuple = ((FREE, 0, "", 0),) * NUM_PAGES
    """(who has it, generation, what it holds, references) of each."""
    commands: tuple = ()
    news: tuple = ()
    sealing: tuple = ()


@dataclass(slots=True)
class Taker:
    state: str = "alive"
    pages: tuple = ((FREE, ""),) * NUM_PAGES
    """(who has it, what it holds) of each."""
    orders: tuple = ()
    """From the router."""
    commands: tuple = ()
    news: tuple = ()
    is_session_lost: bool = False


@dataclass(slots=True)
class Attempt:
    """Of one attempt, what each process has of it."""

    # The call: messages on their way, and who thinks that it stands.
    up: tuple = ()
    down: tuple = ()
    taker_end: str = ""
    holder_end: str = ""
    # The taker's event loop.
    life: str = ""
    take: str = ""
    problem: str = ""
    """Why the taking failed; told when it is drained."""
    transfers: tuple = ((), ())
    """Of each page: (state, page id there, generation, sum, lease, incarnation)."""
    num_known: int = 0
    num_told: int = 0
    is_cut: bool = False
    """Whether what is told goes to a session that is gone."""
    # The taker's engine.
    seq: str = ""
    page_ids: tuple = ()
    # The holder's event loop.
    lease: str = ""
    lease_name: int = 0
    lease_tokens: str = ""
    runs: tuple = ()
    """(index, page id, generation, sum) of each page that is sealed."""
    # The holder's engine.
    held_seq: str = ""
    held_ids: tuple = ()
    num_shared: int = 0
    num_computed: int = 0
    is_finished: bool = False
    """Whether the first token ended the sequence."""
    # On its way to the router.
    entries: tuple = ()


_RECORDS = (Router, Others, Holder, Taker, Taker, Attempt, Attempt)
_READERS = tuple(attrgetter(*(each.name for each in fields(record))) for record in _RECORDS)


class State:
    """All of it, to be changed by one step."""

    def __init__(self, key: Any) -> None:
        parts = [record(*values) for record, values in zip(_RECORDS, key, strict=True)]
        self.router, self.others, self.holder = parts[:3]
        self.takers, self.attempts = parts[3:5], parts[5:]

    def key(self) -> tuple:
        parts = (self.router, self.others, self.holder, *self.takers, *self.attempts)
        return tuple(read(part) for read, part in zip(_READERS, parts, strict=True))


def initial(world: World) -> tuple:
    others = Others(world.num_faults, (), int(world.has_others), int(world.has_others))
    parts = (Router(), others, Holder(), Taker(), Taker(), Attempt(), Attempt())
    return tuple(astuple(part) for part in parts)


Action = Callable[[World, State, int], str | None]
"""Makes something happen to an attempt (or a taker) by its index, and says what in words; None if it can't."""


def steps(
    world: Any, actions: list[tuple[Any, range]], settle: Callable[[Any, Any], None], state_of: Callable[[Any], Any]
) -> Callable[[Any], Iterator[Callable[[], Step | None]]]:
    """Return what `explore` asks for; `settle` ends each step. `state_of` a key: a `State`, or another model's."""

    def of(key: Any) -> Iterator[Callable[[], Step | None]]:
        unused: list[Any] = []

        def step(action: Any, index: int) -> Step | None:
            state = unused.pop() if unused else state_of(key)
            word = action(world, state, index)
            if word is None:
                unused.append(state)
                return None
            settle(world, state)
            return word, state.key()

        for action, indices in actions:
            for index in indices:
                yield partial(step, action, index)

    return of


def move(table: dict, state: str, event: LeaseEvent | TakeEvent) -> str:
    """Return the state after `event`; what the table does not have must not happen."""
    after = table.get((state, event))
    if after is None:
        raise Wrong(f"{event.value!r} happens when it is {state}", "")
    return after


def put(items: tuple, index: int, item: Any) -> tuple:
    """Return `items` with another one at `index`."""
    return (*items[:index], item, *items[index + 1 :])


def content(num_known: int, tokens: str = "") -> tuple[str, str]:
    """Return what the two pages hold of a sequence of which so many output tokens are known."""
    return f"prefix{tokens}", f"tail{num_known}{tokens}"
