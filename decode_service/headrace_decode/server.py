"""gRPC surface of the decode worker: decode, delegate, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc.aio
from headrace.v1 import decode_service_pb2, decode_service_pb2_grpc
from headrace_core.batch.spec import SequenceSpec
from headrace_core.transfer.taker import TransferStats
from headrace_core.transfer.ticket import Ticket, decode_ticket
from headrace_core.wire import decode_sampling

from headrace_decode.session import Session

DECODE_SERVICE = "headrace.v1.DecodeService"


class Decoder(Protocol):
    """Whom the servicer delegates to; errors are as `decode_service.proto` lists them."""

    def open_session(self, session_id: str) -> Session:
        """Begin a session."""
        ...

    def close_session(self, session: Session) -> None:
        """End a session and its sequences. Idempotent."""
        ...

    async def start_sequence(
        self, session_id: str, number: int, spec: SequenceSpec, ticket: Ticket | None
    ) -> tuple[float, TransferStats | None]:
        """Start a sequence; return seconds queued, and what was moved, when it runs."""
        ...

    def cancel_sequence(self, session_id: str, number: int) -> None:
        """Abort a sequence."""
        ...


class DecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    """Adapts `DecodeService` to the worker."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    async def StreamSteps(
        self, request: decode_service_pb2.StreamStepsRequest, context: Any
    ) -> AsyncIterator[decode_service_pb2.StreamStepsResponse]:
        """See `decode_service.proto`."""
        session = self._decoder.open_session(request.session_id)

        # Also when the call ends while this generator is suspended in a `yield`.
        def close(_: object) -> None:
            self._decoder.close_session(session)

        context.add_done_callback(close)
        try:
            yield decode_service_pb2.StreamStepsResponse()
            while True:
                yield await session.next()
        finally:
            self._decoder.close_session(session)

    async def Start(self, request: decode_service_pb2.StartRequest, context: Any) -> decode_service_pb2.StartResponse:
        """See `decode_service.proto`."""
        spec = SequenceSpec(
            request_id=request.request_id,
            attempt=request.attempt,
            sample_index=request.sample_index,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            params=decode_sampling(request.sampling),
        )
        ticket = decode_ticket(request.handoff) if request.HasField("handoff") else None
        queue_s, moved = await self._decoder.start_sequence(request.session_id, request.sequence_number, spec, ticket)
        return decode_service_pb2.StartResponse(
            queue_us=round(queue_s * 1e6),
            transfer_us=round(moved.duration_s * 1e6) if moved else 0,
            transfer_bytes=moved.num_bytes if moved else 0,
            num_transfer_pages=moved.num_pages if moved else 0,
            transport=moved.transport if moved else "",
        )

    async def Cancel(
        self, request: decode_service_pb2.CancelRequest, context: Any
    ) -> decode_service_pb2.CancelResponse:
        """See `decode_service.proto`."""
        self._decoder.cancel_sequence(request.session_id, request.sequence_number)
        return decode_service_pb2.CancelResponse()


def add_decode_servicer(decoder: Decoder, server: grpc.aio.Server) -> None:
    """Register the service."""
    decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(decoder), server)
