"""Transport `grpc`: works wherever the workers can talk at all.

Pages travel as `TransferService.Pull`'s frames, written and read as raw bytes by `frames`: the generic handlers have no
serializer, so a frame is copied once on each side. The taker's connections are its own: no word waits behind bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from headrace.v1 import transfer_service_pb2 as pb
from headrace.v1 import types_pb2

from headrace_core import rpc
from headrace_core.authority import caller_uri
from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    PermissionDeniedError,
    TransferCorruptError,
)
from headrace_core.transfer.connections import Connect, Connections, connect_to_any
from headrace_core.transfer.frames import PageWriter, cut, decode_frame, encode_frame
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Holding, Reading, Source
from headrace_core.transfer.values import Run

SERVICE = "headrace.v1.TransferService"
_OF_THE_HANDOFF = (HandoffLostError, TransferCorruptError, InvalidRequestError, PermissionDeniedError)


class GrpcHolder:
    """Serves `TransferService` for a holder of pages."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding

    def offer(self) -> types_pb2.TransportOffer:
        """See `HolderEnd`."""
        return types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=self._holding.frame_bytes))

    def serve(self, server: grpc.aio.Server) -> None:
        """See `HolderEnd`."""
        handlers: dict[str, Any] = {
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull, pb.PullRequest.FromString, None)
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def close(self) -> None:
        """See `HolderEnd`: the server stops by itself."""

    async def _pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
        holder, memory = self._holding.holder(), self._holding.memory()

        reading = Reading(request.lease_key, request.incarnation, request.tokens_sha256, caller_uri(context))

        def held_pages() -> Sequence[int]:
            return holder.held_pages(
                reading,
                first_layer=request.first_layer,
                num_layers=request.num_layers,
                first_page=request.first_page,
                num_pages=request.num_pages,
            )

        page_ids = held_pages()
        layers = range(request.first_layer, request.first_layer + request.num_layers)
        pages = (memory.page_bytes(layer, page_id) for layer in layers for page_id in page_ids)
        for views in cut(pages, self._holding.frame_bytes):
            held_pages()
            self._holding.on_sent(sum(map(len, views)))
            yield encode_frame(views)
        held_pages()


class GrpcTransfer:
    """A pull under way, in a task of its own: once the task is over, nothing writes to the pages."""

    def __init__(self, receiving: asyncio.Task[None]) -> None:
        self._receiving = receiving

    @property
    def is_drained(self) -> bool:
        """See `Transfer`."""
        return self._receiving.done()

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


class GrpcTaker:
    """Takes pages by `TransferService`; the transfers from one holder share a connection."""

    def __init__(self, memory: PageMemory, connect: Connect = connect_to_any) -> None:
        self._memory = memory
        self.connections = Connections(connect=connect)

    async def prove(self, source: Source) -> None:
        """See `TakerEnd`: control is gRPC, too."""

    def pull(self, source: Source, run: Run, page_ids: Sequence[int], *, timeout_s: float) -> GrpcTransfer:
        """See `TakerEnd`."""
        return GrpcTransfer(asyncio.ensure_future(self._receive(source, run, page_ids, timeout_s)))

    async def disconnect(self, endpoint: str) -> None:
        """See `TakerEnd`."""
        await self.connections.disconnect(endpoint)

    async def close(self) -> None:
        """See `TakerEnd`."""
        await self.connections.close()

    async def _receive(self, source: Source, run: Run, page_ids: Sequence[int], timeout_s: float) -> None:
        layers = range(run.first_layer, run.first_layer + run.num_layers)
        pages = [self._memory.page_bytes(layer, page_id) for layer in layers for page_id in page_ids]
        writer = PageWriter(pages, sum(map(len, pages)))
        request = pb.PullRequest(
            lease_key=source.reading.lease_key,
            incarnation=source.reading.incarnation,
            tokens_sha256=source.reading.tokens_sha256,
            first_layer=run.first_layer,
            num_layers=run.num_layers,
            first_page=run.first_page,
            num_pages=run.num_pages,
        )
        async with self.connections.use(source.endpoint) as channel:
            pull: Any = channel.unary_stream(f"/{SERVICE}/Pull")
            call = pull(request.SerializeToString(), timeout=timeout_s)
            try:
                async for frame in call:
                    writer.write(decode_frame(frame))
            except grpc.aio.AioRpcError as error:
                raise _lost(error, source.endpoint) from error
            finally:
                call.cancel()
        writer.finish()


def _lost(error: grpc.aio.AioRpcError, endpoint: str) -> HeadraceError:
    """Return what a failed pull means: the holder's own words about the hand-off, or that it is gone."""
    raised = rpc.raised_from(error)
    is_ours = raised.reason != error.code().name
    if is_ours and isinstance(raised, _OF_THE_HANDOFF):
        return raised
    return HandoffLostError("HOLDER_LOST", f"{endpoint} did not deliver: {raised.reason}: {raised}")
