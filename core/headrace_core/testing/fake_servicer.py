"""The gRPC face of a fake worker: every service of a worker on one object. See `fake_worker`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc.aio
from headrace.v1 import (
    decode_service_pb2,
    decode_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError
from headrace_core.transfer.hold import add_hold_servicer

if TYPE_CHECKING:
    from headrace_core.testing.fake_worker import FakeWorker


class FakeServicer(
    worker_service_pb2_grpc.WorkerServiceServicer,
    decode_service_pb2_grpc.DecodeServiceServicer,
):
    """Every service of a worker, on one object; but for `HoldService`, which is the real one."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register every service."""
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)
        add_hold_servicer(self._worker, server)

    async def GetInfo(self, request: Any, context: Any) -> worker_service_pb2.GetInfoResponse:
        """See the proto."""
        return self._worker.info

    async def WatchLoad(
        self, request: worker_service_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[worker_service_pb2.WatchLoadResponse]:
        """See the proto."""
        interval_s = min((request.min_interval_ms or 100) / 1000, 1.0)
        while True:
            await self._worker.faults.load_gate.wait()
            load = self._worker.load()
            yield load
            await asyncio.sleep(interval_s)
            if self._worker.load() == load:
                await self._worker.wait_change(1.0 - interval_s)

    async def Drain(self, request: Any, context: Any) -> worker_service_pb2.DrainResponse:
        """See the proto."""
        self._worker.drain()
        return worker_service_pb2.DrainResponse()

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[decode_service_pb2.SessionResponse]:
        """See the proto."""
        opening: decode_service_pb2.SessionRequest = await anext(request_iterator)
        if not opening.open.router_id:
            raise InvalidRequestError("BAD_REQUEST", "a session begins with whose it is")
        router_id = opening.open.router_id
        if opening.open.HasField("worker_incarnation") and opening.open.worker_incarnation != self._worker.incarnation:
            raise HandoffLostError("WORKER_RESTARTED", "the session reached another process")
        outbox = self._worker.open_session(router_id)
        listening = asyncio.create_task(self._listen(router_id, request_iterator))
        try:
            async for message in outbox:
                yield message
        finally:
            listening.cancel()
            self._worker.close_session(router_id, outbox)

    async def _listen(self, router_id: int, requests: AsyncIterator[decode_service_pb2.SessionRequest]) -> None:
        try:
            async for request in requests:
                match request.WhichOneof("command"):
                    case "start":
                        self._worker.start_sequence(router_id, request.start)
                    case "cancel":
                        self._worker.cancel_sequence(router_id, request.cancel)
                    case _:
                        pass
        except HeadraceError:
            return
