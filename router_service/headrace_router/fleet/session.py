"""What happens at one decode worker: one call for all sequences, commands out, entries back, fanned out by number.

    OPENING ── first, empty message ──► OPEN ── end of the call, whatever the reason ──► LOST
Both ways are in order, so no cancel overtakes its start, and what comes late, for an attempt that is over, finds nobody
and is dropped. From an honest worker few such come: too many end the session. A session that is lost fails the
sequences it still has; the worker frees their pages by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from google.protobuf.message import DecodeError
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import worker_service_pb2
from headrace_core.beats import Beat, Silence
from headrace_core.errors import HeadraceError, UnavailableError
from headrace_core.http2.call import Call, Dial
from headrace_core.kv.layout import KvLayout
from headrace_core.pace import Pace
from headrace_core.rpc import answered

from headrace_router.fleet.answers import check_entry

log = logging.getLogger(__name__)

_METHOD = "/headrace.v1.DecodeService/Session"
_MOST_IDLE_PER_S = 200.0
"""Messages that bring no listener anything. An honest worker sends one with each step between the end of a run here and
its cancel there, and beats; what brings a listener tokens is bounded by what it asked for."""
_MOST_IDLE_AT_ONCE = 2000.0
"""Two seconds of steps of 1 ms, in which a worker does not get to our cancels."""
_IDLE_ENTRY_COST = 0.01
"""Of each entry without a listener: 200,000 may come at once, of 1,000 sequences that ended together 200 steps."""


_NEWEST = 0.2
"""Weight of the newest step in their mean."""


class Side(Enum):
    """Who ended a sequence's run at its decode worker."""

    WORKER = "worker"
    """It runs no more: the worker said so, or its session, which holds its sequences, is gone."""
    ROUTER = "router"
    """The worker knows nothing of it and goes on: it must be told."""


class Whose(Enum):
    """Whose failure it was."""

    DECODE = "decode"
    PREFILL = "prefill"
    CHANNEL = "channel"
    """What is between the two, or that they do not fit together."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a sequence's run at its decode worker; `error` is None if it has all its tokens."""

    by: Side
    error: HeadraceError | None = None
    whose: Whose = Whose.DECODE
    is_moved: bool = False
    """True if it is over there because it goes on elsewhere, where it has been placed."""


TakePlainly = Callable[[pb.StepEntry, int, float], bool]
"""Takes an entry that is a plain token below a vocabulary's size, at a time; returns False, and took nothing, if it is
anything else."""


class StepSink(Protocol):
    """Takes what happens to one sequence. Called on the event loop; must not block."""

    take_plainly: TakePlainly | None
    """Asked before `on_entry`, whose every entry is checked first."""

    def on_entry(self, entry: pb.StepEntry, event: str, now_s: float) -> bool:
        """Take what happened, an `event` of that name; return whether it was news.

        What it raises ends the run: `on_ended` by the router follows, and no entry.
        """
        ...

    def on_ended(self, ended: Ended) -> None:
        """The run is over; only the first end counts."""
        ...


@dataclass(frozen=True, slots=True)
class LastTransfer:
    """The last hand-off that moved pages to a worker: by which transport, and how fast."""

    transport: str
    bytes_per_s: int

    @staticmethod
    def of(joined: pb.Joined) -> LastTransfer | None:
        """Return what a decode worker says of one; None if no page moved."""
        moving_us = joined.transfer_us + joined.hidden_transfer_us
        return LastTransfer(joined.transport, joined.transfer_bytes * 1_000_000 // moving_us) if moving_us else None


class Progress(Protocol):
    """Who is told how far an attempt is: `dispatch.Placement`."""

    def on_prefilled(self, num_computed: int) -> None:
        """The prompt is computed: so many tokens of it, the others were cached."""
        ...

    def on_joined(self, transfer: LastTransfer | None) -> None:
        """The decode worker runs it; `transfer` is None if no page moved."""
        ...

    def on_stepped(self, num_computed: int) -> None:
        """The decode worker computed a token; of the prompt it had computed so many if nobody else did."""
        ...


@dataclass(frozen=True, slots=True)
class _Listener:
    attempt: int
    sink: StepSink
    on_leaving: Callable[[], None]


class StepSession:
    """One `Session` call and those who listen to it."""

    def __init__(self, router_id: int, info: worker_service_pb2.GetInfoResponse, layout: KvLayout) -> None:
        """Args: `info` and `layout` are the worker's; a sequence of which it says what they do not allow fails."""
        self.opened = asyncio.Event()
        self._info = info
        self._layout = layout
        self._opening = pb.SessionRequest(open=pb.OpenSession(router_id=router_id, worker_incarnation=info.incarnation))
        self._call: Call | None = None
        self._beat: Beat | None = None
        self._silence: Silence | None = None
        self._listeners: dict[int, _Listener] = {}
        """By sequence."""
        self.step_s = 0.0
        """Of its steps with tokens, a mean of the last ones."""
        self._is_leaving = False
        self._lost: HeadraceError | None = None
        self._idle = Pace("messages for nobody", per_s=_MOST_IDLE_PER_S, burst=_MOST_IDLE_AT_ONCE)

    def start(
        self, sink: StepSink, message: pb.StartSequence, *, on_leaving: Callable[[], None] = lambda: None
    ) -> None:
        """Start a sequence; `sink` hears what becomes of it until `end`, `on_leaving` once if the worker goes away.

        Raises:
            UnavailableError: the session is lost.
        """
        if self._lost is not None:
            raise self._lost
        self._listeners[message.sequence_number] = _Listener(message.attempt, sink, on_leaving)
        self._say(pb.SessionRequest(start=message))

    def end(self, number: int, attempt: int, *, tell: bool, keeps_pages: bool = False) -> None:
        """Drop what still comes for an attempt, and if the worker does not know that it is over, `tell` it.

        With `keeps_pages` the worker is to keep the sequence's pages until it is told without.
        """
        listener = self._listeners.get(number)
        if listener is not None and listener.attempt == attempt:
            del self._listeners[number]
        if tell and self._lost is None:
            cancel = pb.CancelSequence(sequence_number=number, attempt=attempt, keeps_pages=keeps_pages)
            self._say(pb.SessionRequest(cancel=cancel))

    def leave(self) -> None:
        """Tell those who run here that the worker goes away. Only the first call counts."""
        if not self._is_leaving:
            self._is_leaving = True
            for listener in list(self._listeners.values()):
                listener.on_leaving()

    async def run(self, address: str, dial: Dial) -> None:
        """Open the session at the worker, speak and listen until the call ends.

        Raises:
            HeadraceError: always; why it ended. PROTOCOL: too much came for nobody.
        """
        call = self._call = await dial(address, _METHOD, self._on_message)

        def on_silent() -> None:
            problem = "the worker says nothing any more, though its connection stands"
            call.end(UnavailableError("WORKER_LOST", problem))

        self._beat, self._silence = Beat(lambda: self._say(pb.SessionRequest())), Silence(on_silent)
        try:
            self._say(self._opening)
            error = await call.ended
        finally:
            self._silence.close()
            self._beat.close()
            call.close()
        raise error or UnavailableError("WORKER_LOST", "the worker ended the session")

    def fail(self, error: HeadraceError) -> None:
        """End the session: every sequence in it fails with `error`."""
        self._lost = error
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.sink.on_ended(Ended(Side.WORKER, error))

    def _say(self, request: pb.SessionRequest) -> None:
        """Tell the worker, in this turn of the loop; nobody hears it when the call is over."""
        if self._call is not None and self._beat is not None:
            self._call.say(request.SerializeToString())
            self._beat.said()

    def _on_message(self, data: bytes) -> None:
        try:
            message = pb.SessionResponse.FromString(data)
        except DecodeError:
            message = None
        if self._silence is not None:
            self._silence.heard()
        self._fan_out(answered(message))
        self.opened.set()

    def _fan_out(self, message: pb.SessionResponse) -> None:
        now_s = time.monotonic()
        if message.step_us:
            step_s = message.step_us / 1e6
            self.step_s += _NEWEST * (step_s - self.step_s) if self.step_s else step_s
        num_idle = 0
        listeners, info, layout, vocab_size = self._listeners, self._info, self._layout, self._info.vocab_size
        for entry in message.entries:
            number = entry.sequence_number
            listener = listeners.get(number)
            if listener is None or listener.attempt != entry.attempt:
                num_idle += 1
                continue
            sink = listener.sink
            try:
                if (take := sink.take_plainly) is not None and take(entry, vocab_size, now_s):
                    continue
                event = check_entry(entry, info, layout)
                num_idle += not sink.on_entry(entry, event, now_s)
            except Exception as error:  # noqa: BLE001 - the boundary: what one sequence's entry does costs that sequence
                self._drop(number, sink, error)
        if num_idle == len(message.entries):
            self._idle.take(1.0 + num_idle * _IDLE_ENTRY_COST)
        elif num_idle:
            self._idle.take(num_idle * _IDLE_ENTRY_COST)

    def _drop(self, number: int, sink: StepSink, error: Exception) -> None:
        """End a run because of what we could not do with its entry; what came after it would leave a gap."""
        self._listeners.pop(number, None)
        if not isinstance(error, HeadraceError):
            log.error("unhandled error in a step entry", exc_info=error)
            error = HeadraceError("BUG", "internal error")
        sink.on_ended(Ended(Side.ROUTER, error))
