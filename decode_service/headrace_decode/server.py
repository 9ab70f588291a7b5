"""gRPC surface of the decode worker: decode, delegate, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc.aio
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import decode_service_pb2_grpc
from headrace_core.beats import Silence
from headrace_core.errors import HeadraceError, InvalidRequestError, UnavailableError

from headrace_decode.session import Session

DECODE_SERVICE = "headrace.v1.DecodeService"


class Decoder(Protocol):
    """Whom the servicer delegates to; errors are as `decode_service.proto` lists them."""

    def open_session(self, router_id: int, *, incarnation: int | None = None) -> Session:
        """Begin a session, with the process of that `incarnation` alone; an earlier one of the same router ends."""
        ...

    def close_session(self, session: Session, error: HeadraceError) -> None:
        """End a session and its sequences. Idempotent."""
        ...

    def start_sequence(self, session: Session, message: pb.StartSequence) -> None:
        """Start a sequence; what becomes of it, a refusal too, is told in the session."""
        ...

    def cancel_sequence(self, session: Session, number: int, *, attempt: int, keeps_pages: bool = False) -> None:
        """End a sequence, or with `keeps_pages` set it aside."""
        ...


class DecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    """Adapts `DecodeService` to the worker."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:
        """See `decode_service.proto`."""
        opening = await _opening(request_iterator)
        incarnation = opening.worker_incarnation if opening.HasField("worker_incarnation") else None
        session = self._decoder.open_session(opening.router_id, incarnation=incarnation)

        # Also when the call ends while this generator is suspended in a `yield`.
        def close(_: object = None) -> None:
            self._decoder.close_session(session, UnavailableError("SESSION_CLOSED", "the session's call ended"))

        context.add_done_callback(close)
        listening = asyncio.ensure_future(self._listen(request_iterator, session))
        try:
            yield pb.SessionResponse()
            while True:
                yield await session.next()
        finally:
            listening.cancel()
            close()

    async def _listen(self, requests: AsyncIterator[pb.SessionRequest], session: Session) -> None:
        """Do what the router says until it has nothing more to say; then, or when it falls silent, the session ends."""
        decoder = self._decoder
        silent = UnavailableError("SESSION_CLOSED", "the router says nothing any more")
        silence = Silence(lambda: decoder.close_session(session, silent))
        try:
            async for request in requests:
                silence.heard()
                match request.WhichOneof("command"):
                    case "start":
                        decoder.start_sequence(session, request.start)
                    case "cancel":
                        cancel = request.cancel
                        decoder.cancel_sequence(
                            session, cancel.sequence_number, attempt=cancel.attempt, keeps_pages=cancel.keeps_pages
                        )
                    case "open":
                        raise InvalidRequestError("BAD_REQUEST", "the session is open already")
                    case _:
                        pass  # a beat
            decoder.close_session(session, UnavailableError("SESSION_CLOSED", "the router left"))
        except HeadraceError as error:
            decoder.close_session(session, error)
        finally:
            silence.close()


def add_decode_servicer(decoder: Decoder, server: grpc.aio.Server) -> None:
    """Register the service."""
    decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(decoder), server)


async def _opening(requests: AsyncIterator[pb.SessionRequest]) -> pb.OpenSession:
    async for request in requests:
        if not request.HasField("open") or not request.open.router_id:
            break
        return request.open
    raise InvalidRequestError("BAD_REQUEST", "a session begins with whose it is")
