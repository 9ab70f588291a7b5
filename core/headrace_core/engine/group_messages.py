"""What the leader of a group of ranks, rank 0, says to its followers: one broadcast each, and no pickle.

    PLAN   which tokens the step before gave, u32 each, with their number before them; then the diff (`plan_messages`)
    PAGES  first layer, layers, pages: u32 each; ids u32 each; each rank is given its part of these pages next
    ASK    the same: every rank gives its part of these pages next
    BEAT   nothing: every rank answers, which shows that it lives, and whether it was told to leave
    MOVE   a layer, ranks, slots of each: u32 each; then the expert of each slot, u32: have it beside what is there
    SETTLE nothing: every rank says whether it has that, and if all have, all compute with it from now on
    REPORT nothing: every rank gives what it counted since the last time
    STOP   nothing: the group is over

A kind is one byte in front.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from headrace_core.batch.step_diff import StepDiff
from headrace_core.engine import plan_messages
from headrace_core.errors import ProtocolError
from headrace_core.expert_moves import Slots

_PLAN, _PAGES, _BEAT, _STOP, _ASK, _MOVE, _SETTLE, _REPORT = range(1, 9)
_COUNT = struct.Struct("<I")
_PAGES_HEAD = struct.Struct("<III")
_MOVE_HEAD = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. `sampled_ids` are what the step before gave its sampled rows, in order; none if it raised."""

    diff: StepDiff
    sampled_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages that came from another worker; the leader has them, whole."""

    first_layer: int
    num_layers: int
    page_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """Pages of which the leader needs all parts."""

    first_layer: int
    num_layers: int
    page_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Beat:
    """The leader lives; who hears it answers."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where the experts of a layer are to be: all ranks have as many slots."""

    layer: int
    slots: Slots


@dataclass(frozen=True, slots=True)
class Settle:
    """Whoever hears it says how far it is with the last `Move`; all then do the same (`rank_experts`)."""


@dataclass(frozen=True, slots=True)
class Report:
    """Whoever hears it says what it counted (`rank_experts`)."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing follows."""


Message = Plan | Pages | Ask | Beat | Move | Settle | Report | Stop


def encode(message: Message) -> bytes:
    """Return the message's bytes."""
    match message:
        case Plan(diff, sampled_ids):
            tokens = struct.pack(f"<{len(sampled_ids)}I", *sampled_ids)
            return b"".join((bytes([_PLAN]), _COUNT.pack(len(sampled_ids)), tokens, plan_messages.encode(diff)))
        case Pages(first_layer, num_layers, page_ids):
            return bytes([_PAGES]) + _encode_pages(first_layer, num_layers, page_ids)
        case Ask(first_layer, num_layers, page_ids):
            return bytes([_ASK]) + _encode_pages(first_layer, num_layers, page_ids)
        case Beat():
            return bytes([_BEAT])
        case Move(layer, slots):
            experts = [expert for rank in slots for expert in rank]
            head = _MOVE_HEAD.pack(layer, len(slots), len(slots[0]))
            return b"".join((bytes([_MOVE]), head, struct.pack(f"<{len(experts)}I", *experts)))
        case Settle():
            return bytes([_SETTLE])
        case Report():
            return bytes([_REPORT])
        case Stop():
            return bytes([_STOP])


def decode(message: bytes) -> Message:
    """Return the message.

    Raises:
        ProtocolError: PROTOCOL, it is none.
    """
    try:
        match message[:1]:
            case b"\x01":
                (count,) = _COUNT.unpack_from(message, 1)
                start = 1 + _COUNT.size
                sampled_ids = struct.unpack_from(f"<{count}I", message, start)
                return Plan(plan_messages.decode(message[start + 4 * count :]), sampled_ids)
            case b"\x02":
                return Pages(*_decode_pages(message))
            case b"\x05":
                return Ask(*_decode_pages(message))
            case b"\x03":
                return Beat()
            case b"\x04":
                return Stop()
            case b"\x06":
                return _decode_move(message)
            case b"\x07":
                return Settle()
            case b"\x08":
                return Report()
            case kind:
                raise ProtocolError("PROTOCOL", f"a leader said {kind!r}, which is no message of this version")
    except struct.error as error:
        raise ProtocolError("PROTOCOL", f"{len(message)} bytes are no message of a leader: {error}") from error


def _encode_pages(first_layer: int, num_layers: int, page_ids: Sequence[int]) -> bytes:
    head = _PAGES_HEAD.pack(first_layer, num_layers, len(page_ids))
    return head + struct.pack(f"<{len(page_ids)}I", *page_ids)


def _decode_pages(message: bytes) -> tuple[int, int, tuple[int, ...]]:
    first_layer, num_layers, count = _PAGES_HEAD.unpack_from(message, 1)
    return first_layer, num_layers, struct.unpack_from(f"<{count}I", message, 1 + _PAGES_HEAD.size)


def _decode_move(message: bytes) -> Move:
    layer, num_ranks, num_slots = _MOVE_HEAD.unpack_from(message, 1)
    if not num_ranks * num_slots:
        raise ProtocolError("PROTOCOL", f"experts move to {num_slots} slots of {num_ranks} ranks")
    experts = struct.unpack_from(f"<{num_ranks * num_slots}I", message, 1 + _MOVE_HEAD.size)
    return Move(layer, tuple(experts[at : at + num_slots] for at in range(0, len(experts), num_slots)))
