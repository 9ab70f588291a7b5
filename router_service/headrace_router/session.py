"""Step outputs of one decode worker: one stream for all sequences, fanned out by number.

    OPENING ── first, empty message ──► OPEN ── end of stream, whatever the reason ──► LOST
Numbers are never reused in a session, so an output that comes late, for an attempt that is over, finds nobody and is
dropped. From an honest worker few such come: too many end the session. A session that is lost fails the sequences it
still has; the worker frees their pages by itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import grpc.aio
from headrace.v1 import decode_service_pb2
from headrace_core.errors import HeadraceError, ProtocolError, UnavailableError
from headrace_core.rpc import answered, raised_from

from headrace_router.answers import check_output
from headrace_router.pace import Pace

if TYPE_CHECKING:
    from headrace.v1.decode_service_pb2_grpc import DecodeServiceAsyncStub

log = logging.getLogger(__name__)

_MOST_IDLE_PER_S = 200.0
"""Step messages that bring no listener anything. An honest worker sends one with each step between the end of a run
here and its Cancel there; what brings a listener tokens is bounded by what it asked for."""
_MOST_IDLE_AT_ONCE = 2000.0
"""Two seconds of steps of 1 ms, in which a worker does not get to our Cancels."""
_IDLE_OUTPUT_COST = 0.01
"""Of each output without a listener: 200,000 may come at once, of 1,000 sequences that ended together 200 steps."""


class Side(Enum):
    """Who ended a sequence's run at its decode worker."""

    WORKER = "worker"
    """It runs no more: the worker said so, or its session, which holds its sequences, is gone."""
    ROUTER = "router"
    """The worker knows nothing of it and goes on: it must be told."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a sequence's run at its decode worker; `error` is None if it has all its tokens."""

    by: Side
    error: HeadraceError | None = None


class StepSink(Protocol):
    """Takes one sequence's outputs. Called on the event loop; must not block."""

    def on_output(self, output: decode_service_pb2.SequenceOutput, now_s: float) -> None:
        """Take what a step produced. What it raises ends the run: `on_ended` by the router follows, and no output."""
        ...

    def on_ended(self, ended: Ended) -> None:
        """The run is over; only the first end counts."""
        ...


class Watch:
    """A `StepSink` for a call that brings no step outputs: resolved when the worker is lost."""

    def __init__(self) -> None:
        self.over: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    def on_output(self, output: decode_service_pb2.SequenceOutput, now_s: float) -> None:
        """Refuse it: nothing was started under this number."""
        raise ProtocolError("PROTOCOL", "it sent tokens of a sequence that it was not given")

    def on_ended(self, ended: Ended) -> None:
        """See `StepSink`."""
        if not self.over.done():
            self.over.set_result(ended)


class StepSession:
    """One `StreamSteps` call and those who listen to it."""

    def __init__(self, vocab_size: int) -> None:
        """Args: `vocab_size` is the worker's; a sequence of which it sends another token fails."""
        self.session_id = secrets.token_hex(12)
        self.opened = asyncio.Event()
        self._sinks: dict[int, StepSink] = {}
        self._vocab_size = vocab_size
        self._num_given = 0
        self._lost: HeadraceError | None = None
        self._idle = Pace("step messages for nobody", per_s=_MOST_IDLE_PER_S, burst=_MOST_IDLE_AT_ONCE)

    def add(self, sink: StepSink) -> int:
        """Return the number under which `sink` gets outputs from now on.

        Raises:
            UnavailableError: the session is lost.
        """
        if self._lost is not None:
            raise self._lost
        self._num_given += 1
        self._sinks[self._num_given] = sink
        return self._num_given

    def remove(self, number: int) -> None:
        """Drop what still comes for `number`."""
        self._sinks.pop(number, None)

    async def run(self, stub: DecodeServiceAsyncStub) -> None:
        """Read the stream until it ends.

        Raises:
            HeadraceError: always; why it ended. PROTOCOL: too much came for nobody.
        """
        call = stub.StreamSteps(decode_service_pb2.StreamStepsRequest(session_id=self.session_id))
        try:
            async for message in call:
                self._fan_out(answered(message))
                self.opened.set()
        except grpc.aio.AioRpcError as error:
            raise raised_from(error) from error
        finally:
            call.cancel()
        raise UnavailableError("WORKER_LOST", "the worker ended the step stream")

    def fail(self, error: HeadraceError) -> None:
        """End the session: every sequence in it fails with `error`."""
        self._lost = error
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_ended(Ended(Side.WORKER, error))

    def _fan_out(self, message: decode_service_pb2.StreamStepsResponse) -> None:
        now_s = time.monotonic()
        sinks = self._sinks
        num_idle = 0
        for output in message.outputs:
            sink = sinks.get(output.sequence_number)
            if sink is None:
                num_idle += 1
                continue
            try:
                check_output(output, self._vocab_size)
                sink.on_output(output, now_s)
            except HeadraceError as error:
                self._drop(output.sequence_number, sink, error)
            except Exception as error:
                log.error("unhandled error in a step output", exc_info=error)
                self._drop(output.sequence_number, sink, HeadraceError("BUG", "internal error"))
        if num_idle == len(message.outputs):
            self._idle.take(1.0 + num_idle * _IDLE_OUTPUT_COST)
        elif num_idle:
            self._idle.take(num_idle * _IDLE_OUTPUT_COST)

    def _drop(self, number: int, sink: StepSink, error: HeadraceError) -> None:
        """End a run because of what we could not do with its output; what came after it would leave a gap."""
        self.remove(number)
        sink.on_ended(Ended(Side.ROUTER, error))
