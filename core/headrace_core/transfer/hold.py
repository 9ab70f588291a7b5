"""The control of a hand-off, both ends of `HoldService`: always gRPC, whatever moves the bytes. Event loop only.

    taker                                holder
      │ Open ────────────────────────────►│ queue, pages
      │◄──────────────────────── Admitted │ chunks
      │◄───────────────────── Run, Run, … │ sealed: read on another connection
      │◄──────────────────── Last (token) │
      │ verified: Confirm ───────────────►│ were the pages its own until now?
      │◄─────────────────────── Confirmed │ free

The call is the lease. Whoever ends it, or dies, or falls silent, frees the pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

import grpc.aio
from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import hold_service_pb2_grpc

from headrace_core.authority import caller_uri
from headrace_core.beats import Outbox, Silence
from headrace_core.errors import DeadlineError, HandoffLostError, HeadraceError, InvalidRequestError, ProtocolError
from headrace_core.rpc import answered, raised_from
from headrace_core.transfer.values import Order, decode_order, encode_order

HOLD_SERVICE = "headrace.v1.HoldService"


class Held(Protocol):
    """What a holder keeps for one call."""

    def confirm(self) -> None:
        """The taker has everything; the answer goes into the outbox.

        Raises:
            HeadraceError: it has not, or what it has may be something else.
        """
        ...

    def end(self) -> None:
        """The call is over: free what is held. Idempotent."""
        ...


class Holder(Protocol):
    """Whom the service delegates to."""

    def hold(self, order: Order, outbox: Outbox[pb.HoldResponse]) -> Held:
        """Begin to compute what is ordered; what happens goes into `outbox`, which is closed at the end.

        Raises:
            HeadraceError: it is refused.
        """
        ...


class HoldServicer(hold_service_pb2_grpc.HoldServiceServicer):
    """The holder's end."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    async def Hold(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.HoldResponse]:
        """See `hold_service.proto`."""
        order = replace(await _first_order(request_iterator), taker=caller_uri(context))
        outbox = Outbox(pb.HoldResponse())
        held = self._holder.hold(order, outbox)

        # Also when the call ends while this generator is suspended in a `yield`.
        def end(_: object) -> None:
            held.end()

        context.add_done_callback(end)
        deadline = asyncio.get_running_loop().call_later(order.timeout_s, outbox.close, _late(order))
        listening = asyncio.ensure_future(_listen(request_iterator, held, outbox))
        try:
            async for response in outbox:
                yield response
        finally:
            deadline.cancel()
            listening.cancel()
            held.end()


def add_hold_servicer(holder: Holder, server: grpc.aio.Server) -> None:
    """Register the service."""
    hold_service_pb2_grpc.add_HoldServiceServicer_to_server(HoldServicer(holder), server)


class Side(Enum):
    """Whose a failure is."""

    TAKER = "taker"
    HOLDER = "holder"
    CHANNEL = "channel"
    """Neither's: what is between them, or that they do not fit together."""


class TakeError(Exception):
    """A hand-off failed: `error` says why, `side` whose fault it is."""

    def __init__(self, side: Side, error: HeadraceError) -> None:
        super().__init__(f"{side.value}: {error}")
        self.side = side
        self.error = error


class HoldCall:
    """The taker's end of one call."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        order: Order,
        endpoint: str,
        *,
        change: Callable[[pb.Open], None] = lambda message: None,
    ) -> None:
        """Args: `change` lets tests order what can't be."""
        self._endpoint = endpoint
        self.outbox = Outbox(pb.HoldRequest())
        opening = encode_order(order)
        change(opening)
        self.outbox.put(pb.HoldRequest(open=opening))
        stub: Any = hold_service_pb2_grpc.HoldServiceStub(channel)
        self._call = stub.Hold(aiter(self.outbox), timeout=order.timeout_s)
        self._is_silent = False
        self.num_beats = 0
        """That came from the holder."""

    async def events(self) -> AsyncIterator[pb.HoldResponse]:
        """Yield what the holder says, without its beats, until it ends the call.

        Raises:
            TakeError: HOLDER, it gave a reason, spoke nonsense or fell silent; CHANNEL, HOLDER_LOST.
        """
        silence = Silence(self._on_silent)
        try:
            async for response in self._call:
                silence.heard()
                if answered(response).WhichOneof("event"):
                    yield response
                else:
                    self.num_beats += 1
        except ProtocolError as error:
            raise TakeError(Side.HOLDER, error) from error
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_silent or (task is not None and task.cancelling()):
                raise
            problem = f"{self._endpoint} says nothing any more, though its connection stands"
            raise TakeError(Side.HOLDER, HandoffLostError("HOLDER_LOST", problem)) from None
        finally:
            silence.close()
            self.cancel()

    def confirm(self) -> None:
        """Say that everything is here."""
        self.outbox.put(pb.HoldRequest(confirm=pb.Confirm()))

    def cancel(self) -> None:
        """End the call, and with it the lease. Idempotent."""
        self.outbox.close()
        self._call.cancel()

    def _on_silent(self) -> None:
        self._is_silent = True
        self._call.cancel()

    def _lost(self, error: grpc.aio.AioRpcError) -> TakeError:
        raised = raised_from(error)
        if raised.reason != error.code().name:
            return TakeError(Side.HOLDER, raised)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return TakeError(Side.TAKER, DeadlineError("DEADLINE_EXCEEDED", "the sequence's time is up"))
        problem = f"{self._endpoint} is gone: {raised.reason}: {raised}"
        return TakeError(Side.CHANNEL, HandoffLostError("HOLDER_LOST", problem))


async def _first_order(requests: AsyncIterator[pb.HoldRequest]) -> Order:
    async for request in requests:
        if not request.HasField("open"):
            break
        return decode_order(request.open)
    raise InvalidRequestError("BAD_REQUEST", "a Hold call begins with what is wanted")


async def _listen(requests: AsyncIterator[pb.HoldRequest], held: Held, outbox: Outbox[pb.HoldResponse]) -> None:
    """Hear the taker until it has nothing more to say; then, or when it falls silent, the call ends."""
    silence = Silence(lambda: outbox.close(HandoffLostError("TAKER_LOST", "the taker says nothing any more")))
    try:
        async for request in requests:
            silence.heard()
            if request.HasField("confirm"):
                held.confirm()
            elif request.HasField("open"):
                raise InvalidRequestError("BAD_REQUEST", "a Hold call is for one sequence")
        outbox.close(HandoffLostError("TAKER_LOST", "the taker left before it confirmed"))
    except HeadraceError as error:
        outbox.close(error)
    finally:
        silence.close()


def _late(order: Order) -> DeadlineError:
    return DeadlineError("DEADLINE_EXCEEDED", f"request {order.spec.request_id}: the sequence's time is up")
