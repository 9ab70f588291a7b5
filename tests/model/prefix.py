"""The way back, all of it, to be visited."""

from dataclasses import astuple

from .explore import Explored, explore
from .prefix_faults import ACTIONS as FAULT_ACTIONS
from .prefix_faults import check_end
from .prefix_holder import ACTIONS as HOLDER_ACTIONS
from .prefix_taker import ACTIONS as TAKER_ACTIONS
from .prefix_world import Fetch, Holder, PrefixState, PrefixWorld
from .world import steps

ACTIONS = TAKER_ACTIONS + HOLDER_ACTIONS + FAULT_ACTIONS
W, S = PrefixWorld, PrefixState

PREFIX_WORLDS = [
    PrefixWorld("two-sided reads, any one fault"),
    PrefixWorld("one-sided reads, any one fault", is_one_sided=True),
]


def _without(*guards: str, faults=(), **more) -> PrefixWorld:
    name = f"without {' and '.join(guards)}"
    return PrefixWorld(name, faults=faults, num_faults=len(faults), without=guards, **more)


PREFIX_MISSED = [
    (_without("references"), "a fetch failed though nothing went wrong"),
    (_without("references", "generation"), "is computed on"),
    (_without("own reference"), "a fetch failed though nothing went wrong"),
    (_without("generation", faults=("freed behind",)), "is computed on"),
    (_without("last look", faults=("freed behind",), is_one_sided=True), "is computed on"),
    (_without("checksum", faults=("bytes flip",)), "is computed on"),
    (_without("quarantine", faults=("cancel",)), "a page is written that is another's, or free"),
    (_without("drain", faults=("cancel",), is_one_sided=True), "bytes land in a page that is another's, or free"),
    (_without("never begun", faults=("cancel",)), "are never free again"),
]
"""(world without a guard, or two, what goes wrong in it)."""


def initial_prefix(w: W) -> tuple:
    return tuple(astuple(part) for part in (Holder(num_faults=w.num_faults), Fetch(), Fetch()))


def settle(w: W, s: S) -> None:
    """Do at once what needs no choice of its own (see `settle.py`), and forget what nothing looks at any more."""
    h = s.holder
    while h.news and s.fetches[h.news[0][0]].lease == "freed":
        h.news = h.news[1:]
    while h.sealing and s.fetches[h.sealing[0][0]].lease == "freed":
        h.sealing = h.sealing[1:]
    for f in s.fetches:
        if f.taker_end == "closed":
            f.down = ()
        if f.holder_end == "closed":
            f.up = ()
        if f.lease == "freed":
            f.runs = ()
        if f.take == "drained" and all(not it or it[0] in ("done", "lost") for it in f.transfers):
            f.transfers = ((), ())
        while f.seq == "gone" and f.commands:
            f.commands = f.commands[1:]
        if f.seq == "gone":
            f.pages, f.num_wanted = ("", ""), -1


def visit_prefix(w: W) -> Explored:
    return explore(initial_prefix(w), steps(w, ACTIONS, settle, PrefixState), check_end(w))
