"""Transport `grpc`: works wherever the workers can talk at all.

Control is protobuf. Pages travel as `TransferService.Pull`'s frames, written and read as raw bytes by `frames`: the
generic handlers have no serializer, so a frame is copied once on each side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from headrace.v1 import transfer_service_pb2 as pb
from headrace.v1 import types_pb2

from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    ProtocolError,
    TransferCorruptError,
)
from headrace_core.rpc import answered, raised_from
from headrace_core.transfer.connections import Connections
from headrace_core.transfer.frames import PageWriter, cut, decode_frame, encode_frame
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transport import LeaseHolder, PageMemory

SERVICE = "headrace.v1.TransferService"


class GrpcHolder:
    """Serves `TransferService` for a holder of pages."""

    def __init__(
        self,
        holder: Callable[[], LeaseHolder],
        memory: Callable[[], PageMemory],
        *,
        frame_bytes: int,
        on_sent: Callable[[float], None],
    ) -> None:
        """`holder` and `memory` may raise while the worker is starting; `on_sent` counts bytes."""
        self._holder = holder
        self._memory = memory
        self._frame_bytes = frame_bytes
        self._on_sent = on_sent

    def offer(self) -> types_pb2.TransportOffer:
        """Return the offer that goes into tickets."""
        return types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=self._frame_bytes))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        handlers: dict[str, Any] = {
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull, pb.PullRequest.FromString, None),
            "RenewLease": grpc.unary_unary_rpc_method_handler(
                self._renew, pb.RenewLeaseRequest.FromString, pb.RenewLeaseResponse.SerializeToString
            ),
            "ReleaseLease": grpc.unary_unary_rpc_method_handler(
                self._release, pb.ReleaseLeaseRequest.FromString, pb.ReleaseLeaseResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def _pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
        holder, memory = self._holder(), self._memory()

        def held_pages() -> Sequence[int]:
            return holder.held_pages(
                request.lease_id,
                attempt=request.attempt,
                incarnation=request.holder_incarnation,
                tokens_sha256=request.tokens_sha256,
            )

        page_ids = held_pages()
        try:
            pages = [
                memory.page_bytes(layer, page_id)
                for layer in range(request.first_layer, request.first_layer + request.num_layers)
                for page_id in page_ids
            ]
        except IndexError as error:
            raise InvalidRequestError("BAD_HANDOFF", f"there is no such layer: {error}") from error
        for views in cut(pages, self._frame_bytes):
            held_pages()
            frame = encode_frame(views)
            self._on_sent(len(frame))
            yield frame
        held_pages()

    async def _renew(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseResponse:
        duration_s = self._holder().renew(request.lease_id, incarnation=request.holder_incarnation)
        return pb.RenewLeaseResponse(duration_ms=max(round(duration_s * 1000), 1))

    async def _release(self, request: pb.ReleaseLeaseRequest, context: Any) -> pb.ReleaseLeaseResponse:
        self._holder().release(request.lease_id, incarnation=request.holder_incarnation)
        return pb.ReleaseLeaseResponse()


class GrpcTransfer:
    """A pull under way, in a task of its own: once the task is over, nothing writes to the pages."""

    def __init__(self, receiving: asyncio.Task[None]) -> None:
        self._receiving = receiving

    async def wait(self) -> None:
        """See `Transfer`."""
        await asyncio.wait([self._receiving])
        if self._receiving.cancelled():
            raise HandoffLostError("HOLDER_LOST", "the connection to the holder was torn down")
        self._receiving.result()

    def cancel(self) -> None:
        """See `Transfer`."""
        self._receiving.cancel()

    async def drained(self) -> None:
        """See `Transfer`."""
        await asyncio.wait([self._receiving])
        if not self._receiving.cancelled():
            self._receiving.exception()  # seen: it is `wait`'s to raise


class GrpcTransport:
    """Takes pages by `TransferService`; the transfers from one holder share a connection."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self.connections = Connections()

    def pull(self, ticket: Ticket, page_ids: Sequence[int], *, timeout_s: float) -> GrpcTransfer:
        """See `Transport`."""
        return GrpcTransfer(asyncio.ensure_future(self._receive(ticket, page_ids, timeout_s)))

    async def renew(self, ticket: Ticket, *, timeout_s: float) -> float:
        """See `Transport`."""
        request = pb.RenewLeaseRequest(lease_id=ticket.lease_id, holder_incarnation=ticket.holder_incarnation)
        reply: bytes = await self._call(ticket, "RenewLease", request.SerializeToString(), timeout_s)
        try:
            duration_ms = pb.RenewLeaseResponse.FromString(reply).duration_ms
        except DecodeError as error:
            raise ProtocolError("PROTOCOL", f"{ticket.holder_endpoint} answered with no message: {error}") from error
        if not duration_ms:
            raise ProtocolError("PROTOCOL", f"{ticket.holder_endpoint} renewed a lease for no time at all")
        return duration_ms / 1000

    async def release(self, ticket: Ticket, *, timeout_s: float) -> None:
        """See `Transport`."""
        request = pb.ReleaseLeaseRequest(lease_id=ticket.lease_id, holder_incarnation=ticket.holder_incarnation)
        await self._call(ticket, "ReleaseLease", request.SerializeToString(), timeout_s)

    async def disconnect(self, endpoint: str) -> None:
        """See `Transport`."""
        await self.connections.disconnect(endpoint)

    async def close(self) -> None:
        """See `Transport`."""
        await self.connections.close()

    async def _receive(self, ticket: Ticket, page_ids: Sequence[int], timeout_s: float) -> None:
        layers = range(ticket.layout.num_layers)
        pages = (self._memory.page_bytes(layer, page_id) for layer in layers for page_id in page_ids)
        writer = PageWriter(pages, ticket.num_bytes)
        request = pb.PullRequest(
            lease_id=ticket.lease_id,
            attempt=ticket.attempt,
            holder_incarnation=ticket.holder_incarnation,
            first_layer=0,
            num_layers=ticket.layout.num_layers,
            tokens_sha256=ticket.tokens_sha256,
        )
        with self.connections.use(ticket.holder_endpoint) as channel:
            pull: Any = channel.unary_stream(f"/{SERVICE}/Pull")
            call = pull(request.SerializeToString(), timeout=timeout_s)
            try:
                async for frame in call:
                    writer.write(decode_frame(frame))
            except grpc.aio.AioRpcError as error:
                raise _lost(error, ticket) from error
            finally:
                call.cancel()
        writer.finish()

    async def _call(self, ticket: Ticket, method: str, request: bytes, timeout_s: float) -> bytes:
        with self.connections.use(ticket.holder_endpoint) as channel:
            call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
            try:
                return answered(await call(request, timeout=timeout_s))
            except grpc.aio.AioRpcError as error:
                raise raised_from(error) from error


def _lost(error: grpc.aio.AioRpcError, ticket: Ticket) -> HeadraceError:
    """Return what a failed pull means: the holder's own words about the hand-off, or that it is gone."""
    raised = raised_from(error)
    is_ours = raised.reason != error.code().name
    if is_ours and isinstance(raised, HandoffLostError | TransferCorruptError | InvalidRequestError):
        return raised
    return HandoffLostError("HOLDER_LOST", f"{ticket.holder_endpoint} did not deliver: {raised.reason}: {raised}")
