"""The worlds that are explored, and for each guard one in which it is missed."""

import sys

from .explore import Explored, explore
from .faults import ACTIONS as FAULT_ACTIONS
from .faults import check_end
from .holder import ACTIONS as HOLDER_ACTIONS
from .router import ACTIONS as ROUTER_ACTIONS
from .settle import settle
from .taker import ACTIONS as TAKER_ACTIONS
from .world import FAULTS, State, World, initial, steps

ACTIONS = ROUTER_ACTIONS + TAKER_ACTIONS + HOLDER_ACTIONS + FAULT_ACTIONS

_ANY = tuple(fault for fault in FAULTS if fault != "taker hangs")
"""One that hangs takes no second attempt: it has worlds of its own, with another taker."""
_ONE_SIDED, _OTHER_TAKER = (True, True), (0, 1)

WORLDS = [
    World("two-sided reads, any one fault, other sequences", faults=_ANY),
    World("one-sided reads, any one fault, other sequences", faults=_ANY, is_one_sided=_ONE_SIDED),
    World("one-sided, then two-sided", faults=_ANY, is_one_sided=(True, False), has_others=False),
    World("two-sided, then one-sided", faults=_ANY, is_one_sided=(False, True), has_others=False),
    World("another taker, the first hangs", faults=("taker hangs",), takers=_OTHER_TAKER, has_others=False),
    World(
        "another taker, the first hangs, one-sided",
        faults=("taker hangs",),
        takers=_OTHER_TAKER,
        is_one_sided=_ONE_SIDED,
        has_others=False,
    ),
    World(
        "another taker, what fails at the holder and between",
        faults=("holder restarts", "step fails", "bytes flip", "other order", "freed behind", "entry garbled"),
        takers=_OTHER_TAKER,
        has_others=False,
    ),
]
"""In `make test`."""

LARGE_WORLDS = [
    World("another taker, a session is lost", faults=("session lost",), takers=_OTHER_TAKER, has_others=False),
    World("two-sided reads, any two faults", faults=_ANY, num_faults=2, has_others=False),
    World("one-sided reads, any two faults", faults=_ANY, num_faults=2, is_one_sided=_ONE_SIDED, has_others=False),
]
"""In `make model`, too."""


def _without(guard: str, *faults: str, has_others: bool = False, **world) -> World:
    num_faults = max(1, len(faults))
    return World(
        f"without {guard}", faults=faults, num_faults=num_faults, has_others=has_others, without=guard, **world
    )


MISSED = [
    (_without("generation", "freed behind", has_others=True), "foreign"),
    (_without("generation", "freed behind", has_others=True, is_one_sided=_ONE_SIDED), "foreign"),
    (_without("last look", "freed behind", has_others=True, is_one_sided=_ONE_SIDED), "foreign"),
    (_without("lease", "deadline"), "a page is shown that is under no lease"),
    (
        _without("incarnation", "session lost", "holder restarts", takers=_OTHER_TAKER),
        "a page of another lease is shown",
    ),
    (_without("token hash", "other order"), "a wrong token"),
    (_without("checksum", "bytes flip"), "damaged"),
    (_without("quarantine", "cancel"), "a page is written that is another's, or free"),
    (_without("quarantine", "cancel", is_one_sided=_ONE_SIDED), "bytes land in a page that is another's, or free"),
    (_without("drain", "cancel", is_one_sided=_ONE_SIDED), "bytes land in a page that is another's, or free"),
    (
        _without("drain to the end", "transfer times out", "cancel", is_one_sided=_ONE_SIDED),
        "bytes land in a page that is another's, or free",
    ),
    (_without("never begun", "cancel"), "pages of taker 1 are never free again"),
    (_without("attempt at the holder", "session lost", takers=_OTHER_TAKER), "an older attempt ended a newer one"),
    (_without("attempt at the router", "entry garbled"), "cost both attempts"),
    (_without("position", "entry twice"), "a token comes twice"),
    (_without("position", "entry lost"), "a token is lost"),
    (_without("references", has_others=True), "a page is taken that somebody reads"),
    (_without("sealed in time", "cancel"), "'seal' happens when it is freed"),
    (_without("silence", "taker hangs", takers=_OTHER_TAKER), "the client never hears the end"),
    (_without("confirm"), "cost both attempts"),
    (_without("last heard", "session lost"), "cost both attempts"),
]
"""(world without a guard, what goes wrong in it)."""

NOT_MISSED = [_without("last look", "freed behind", has_others=True)]
"""With two-sided reads the look before each frame sees what the last look would."""


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def visit(world: World) -> Explored:
    return explore(initial(world), steps(world, ACTIONS, settle, State), check_end(world))
