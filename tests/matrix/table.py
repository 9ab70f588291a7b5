"""The failure matrix, as data: phases, events, how each cell must end, and why the others can't be.

A cell is one request in one phase when one event strikes. `cell.py` brings it there and looks at the end; what an event
does is the function of its name in `events.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PHASES = ("queued", "dispatched", "prefilling", "publishing", "transferring", "decoding", "finishing")
WHERE: Mapping[str, str] = {
    "queued": "it waits in the router: no decode worker has a place",
    "dispatched": "decode and prefill worker have it, and the prefill worker computes another one",
    "prefilling": "the step that computes its prompt is under way",
    "publishing": "its prompt is computed; the decode worker is not told of its pages yet",
    "transferring": "some bytes of its pages have left, and the decode worker does not have all",
    "decoding": "a step of the decode worker is under way, the third token is out",
    "finishing": "its last token is made, its pages are free there, and the router has not heard of it",
}

EXACT = "exact"
"""Every token is the one that the model gives alone."""
LEFT = "left"
"""The client went and is told nothing."""

_FIRST_TOKEN = PHASES[:3]
"""Nothing of the answer is out: a client that loses its router can't tell it from one that was never there."""
_ROUTER_GONE = {phase: "UNREACHABLE" if phase in _FIRST_TOKEN else "CONNECTION_LOST" for phase in PHASES}


@dataclass(frozen=True, slots=True)
class Event:
    """One row. `ends` is how the request ends, by phase; phases that are not in it are in `excluded`, with a reason.

    `causes` are the reasons that attempts may fail with, and in the phases of `retried` one must.
    """

    name: str
    title: str
    ends: Mapping[str, str]
    causes: Sequence[str] = ()
    retried: Sequence[str] = ()
    excluded: Mapping[str, str] = field(default_factory=dict[str, str])
    has_spare: bool = True
    """A second pair of workers takes part once the phase is reached."""
    is_proxied: bool = False
    """Connections to the processes that the router's workers file names, and to the router, can be held up."""
    is_second_attempt: bool = False
    """The first attempt failed with CHECKSUM before."""

    def __post_init__(self) -> None:
        assert set(self.ends) | set(self.excluded) == set(PHASES), f"{self.name}: a phase without an end or a reason"
        assert not set(self.ends) & set(self.excluded), f"{self.name}: a phase with both"


@dataclass(frozen=True, slots=True)
class Cell:
    """One event in one phase over one transport."""

    event: Event
    phase: str
    transport: str = "grpc"

    @property
    def name(self) -> str:
        """Its name in reports."""
        return f"{self.event.name} while {self.phase} over {self.transport}"


def _all(end: str) -> dict[str, str]:
    return dict.fromkeys(PHASES, end)


def _only(*phases: str, end: str = EXACT) -> dict[str, str]:
    return dict.fromkeys(phases, end)


def _why(reason: str, *phases: str) -> dict[str, str]:
    return dict.fromkeys(phases, reason)


_HELD = PHASES[1:5]
"""A prefill worker has the sequence."""
_PREFILL_LOST = ("HOLDER_LOST", "WORKER_LOST", "DRAINING", "NO_COMMON_TRANSPORT")
"""The last where a transport is proven by the holder's answer, as nixl is, and none comes."""
_NOT_PLACED = "no worker has anything of it yet"
_CONFIRMED = "its pages were confirmed: nobody reads at the prefill worker any more"
_NO_BYTES = "no page moves yet; what a holder may say in its Hold call is all in tests/fault/test_handoff_fencing.py"
_IN_ORDER = "nothing comes after the last entry, and a stream that is in order does not lose its end without ending"

EVENTS: tuple[Event, ...] = (
    Event("client_abort", "the client leaves", _all(LEFT), has_spare=False),
    Event("deadline", "the client's time is up", _all("DEADLINE_EXCEEDED"), has_spare=False),
    Event("slow_reader", "the client does not read until all is over", _all(EXACT), has_spare=False),
    Event("kill_prefill", "SIGKILL of the prefill worker", _all(EXACT), _PREFILL_LOST, _HELD),
    Event("kill_decode", "SIGKILL of the decode worker", _all(EXACT), ("WORKER_LOST",), PHASES[1:]),
    Event("kill_router", "SIGKILL of the router", _ROUTER_GONE, has_spare=False),
    Event("stop_prefill", "SIGSTOP of the prefill worker", _all(EXACT), _PREFILL_LOST, _HELD),
    Event("stop_decode", "SIGSTOP of the decode worker", _all(EXACT), ("WORKER_LOST",), PHASES[1:]),
    Event("stop_router", "SIGSTOP of the router", _ROUTER_GONE, has_spare=False),
    Event("hang_prefill", "the prefill worker's event loop hangs", _all(EXACT), _PREFILL_LOST, _HELD),
    Event("hang_decode", "the decode worker's event loop hangs", _all(EXACT), ("WORKER_LOST",), PHASES[1:]),
    Event("term_prefill", "SIGTERM of the prefill worker", _all(EXACT), ("DRAINING",)),
    Event("term_decode", "SIGTERM of the decode worker", _all(EXACT), ("DRAINING",)),
    Event("term_router", "SIGTERM of the router", _all(EXACT)),
    Event(
        "partition_prefill", "the prefill worker is cut off", _all(EXACT), _PREFILL_LOST, _HELD, is_proxied=True
    ),
    Event(
        "partition_decode", "the decode worker is cut off from the router", _all(EXACT), ("WORKER_LOST",), PHASES[1:],
        is_proxied=True,
    ),
    Event("partition_client", "the router is cut off from its client", _ROUTER_GONE, is_proxied=True, has_spare=False),
    Event(
        "corrupted", "bytes are others", _only("transferring", "decoding", "finishing"), ("CHECKSUM", "PROTOCOL"),
        ("transferring", "decoding", "finishing"), _why(_NO_BYTES, *PHASES[:4]), has_spare=False,
    ),
    Event(
        "truncated", "bytes are missing", _only("transferring", "decoding"), ("SHORT_READ", "CHECKSUM", "PROTOCOL"),
        ("transferring", "decoding"), _why(_NO_BYTES, *PHASES[:4]) | _why(_IN_ORDER, "finishing"), has_spare=False,
    ),
    Event(
        "duplicated", "bytes come twice", _only("transferring", "decoding", "finishing"), ("SHORT_READ", "CHECKSUM"),
        ("transferring",), _why(_NO_BYTES, *PHASES[:4]), has_spare=False,
    ),
    Event(
        "reordered", "bytes come in another order", _only("transferring", "decoding"), ("CHECKSUM", "PROTOCOL"),
        ("transferring", "decoding"), _why(_NO_BYTES, *PHASES[:4]) | _why(_IN_ORDER, "finishing"), has_spare=False,
    ),
    Event(
        "reused_page", "a page is reused while it is read", _only("publishing", "transferring"), ("STALE_PAGE",),
        ("publishing", "transferring"),
        _why("none of its pages is sealed yet", *PHASES[:3]) | _why(_CONFIRMED, *PHASES[5:]), has_spare=False,
    ),
    Event(
        "foreign_model", "the holder comes back with another model", _only(*PHASES[:5]),
        (*_PREFILL_LOST, "MODEL_MISMATCH"), _HELD, _why(_CONFIRMED, *PHASES[5:]),
    ),
    Event(
        "older_attempt", "an older attempt's messages come late", _only(*PHASES[2:]), ("CHECKSUM",), PHASES[2:],
        _why(_NOT_PLACED, "queued")
        | _why("as while prefilling: the lease that an older Open meets is the same", "dispatched"),
        has_spare=False, is_second_attempt=True,
    ),
    Event(
        "restarted_holder", "the holder restarts at its address", _only(*PHASES[:5]),
        (*_PREFILL_LOST, "WORKER_RESTARTED"), _HELD, _why(_CONFIRMED, *PHASES[5:]),
    ),
    Event(
        "prefill_out_of_pages", "the prefill worker has no page left", _only("queued", "dispatched"), (), (),
        _why("a prompt has all its pages from its admission on", *PHASES[2:5]) | _why(_CONFIRMED, *PHASES[5:]),
        has_spare=False,
    ),
    Event(
        "decode_out_of_pages", "the decode worker has no page left", _only("queued", "decoding"), (), (),
        _why("its pages were reserved before anything was asked of the prefill worker", *PHASES[1:5])
        | _why("its pages are free already", "finishing"), has_spare=False,
    ),
)  # fmt: skip


def cells(transport: str) -> list[Cell]:
    """Return every cell that can be."""
    return [Cell(event, phase, transport) for event in EVENTS for phase in event.ends]
