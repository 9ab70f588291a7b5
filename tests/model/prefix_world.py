"""The way back: two prompts begin with what a decode worker has cached, and each asks it for the pages.

The holder is the decode worker: two cached pages, one after the other, and no others, so whoever else wants a page
there evicts one. Each prompt is a sequence of a prefill worker that has pages of its own; it is computed on what came,
or from the beginning. Nothing that goes wrong may cost more than that. Event loop and engine's thread of a process meet
at queues.
"""

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from .world import CACHED

PREFIX = ("page 0", "page 1")

PREFIX_GUARDS = {
    "references": "a page is kept as long as somebody may read it",
    "own reference": "who has read gives its own references back, not the pages",
    "generation": "the holder compares generations, before each frame and when the taker confirms",
    "last look": "the holder compares generations when the taker confirms",
    "checksum": "what arrived is compared with what was sealed",
    "quarantine": "pages that are fetched into are set aside until no byte can land",
    "drain": "the taking ends only when no byte can land",
    "never begun": "pages are given back of which the loop had yet to hear",
}
PREFIX_FAULTS = {
    "cancel": "a prompt's own taker leaves",
    "holder restarts": "the decode worker dies and another one starts",
    "bytes flip": "bytes flip on their way",
    "freed behind": "a page is freed though its call lives: an error of ours",
}


@dataclass(frozen=True)
class PrefixWorld:
    name: str
    is_one_sided: bool = False
    faults: tuple[str, ...] = tuple(PREFIX_FAULTS)
    num_faults: int = 1
    without: tuple[str, ...] = ()
    """The guards that are missing."""

    def has(self, guard: str) -> bool:
        assert guard in PREFIX_GUARDS, guard
        return guard not in self.without


@dataclass(slots=True)
class Holder:
    pages: tuple = tuple((CACHED, 0, what, 0) for what in PREFIX)
    """(who has it, generation, what it holds, references) of each."""
    commands: tuple = ()
    news: tuple = ()
    sealing: tuple = ()
    num_reuses: int = 2
    num_faults: int = 0
    happened: tuple = ()


@dataclass(slots=True)
class Fetch:
    """Of one prompt, what each process has of it."""

    # The call.
    up: tuple = ()
    down: tuple = ()
    taker_end: str = ""
    holder_end: str = ""
    # The prefill worker's loop.
    is_live: bool = True
    take: str = ""
    num_wanted: int = -1
    """Pages that are to come; -1: nothing is admitted."""
    transfers: tuple = ((), ())
    """Of each page: (state, page id there, generation, sum)."""
    # Its engine.
    seq: str = "waiting"
    pages: tuple = ("", "")
    """What they hold."""
    is_taken: bool = False
    news: tuple = ()
    commands: tuple = ()
    # The holder's loop and engine.
    lease: str = ""
    runs: tuple = ()
    held_ids: tuple = ()


_RECORDS = (Holder, Fetch, Fetch)
_READERS = tuple(attrgetter(*(each.name for each in fields(record))) for record in _RECORDS)


class PrefixState:
    """All of it, to be changed by one step."""

    def __init__(self, key: Any) -> None:
        parts = [record(*values) for record, values in zip(_RECORDS, key, strict=True)]
        self.holder, self.fetches = parts[0], parts[1:]

    def key(self) -> tuple:
        return tuple(read(part) for read, part in zip(_READERS, (self.holder, *self.fetches), strict=True))
