"""The gRPC face of a fake worker: every service of a worker on one object. See `fake_worker`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc.aio
from headrace.v1 import (
    decode_service_pb2,
    decode_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

from headrace_core.errors import HeadraceError

if TYPE_CHECKING:
    from headrace_core.testing.fake_worker import FakeWorker


class FakeServicer(
    worker_service_pb2_grpc.WorkerServiceServicer,
    prefill_service_pb2_grpc.PrefillServiceServicer,
    decode_service_pb2_grpc.DecodeServiceServicer,
    transfer_service_pb2_grpc.TransferServiceServicer,
):
    """Every service of a worker, on one object."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register every service."""
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)
        decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(self, server)

    async def GetInfo(self, request: Any, context: Any) -> worker_service_pb2.GetInfoResponse:
        """See the proto."""
        return self._worker.info

    async def WatchLoad(
        self, request: worker_service_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[worker_service_pb2.WatchLoadResponse]:
        """See the proto."""
        interval_s = (request.min_interval_ms or 100) / 1000
        while True:
            load = self._worker.load()
            yield load
            await asyncio.sleep(interval_s)
            if self._worker.load() == load:
                await self._worker.wait_change(1.0 - interval_s)

    async def Drain(self, request: Any, context: Any) -> worker_service_pb2.DrainResponse:
        """See the proto."""
        self._worker.drain()
        return worker_service_pb2.DrainResponse()

    async def Prefill(
        self, request: prefill_service_pb2.PrefillRequest, context: Any
    ) -> prefill_service_pb2.PrefillResponse:
        """See the proto."""
        return await self._worker.prefill(request)

    async def CancelPrefill(
        self, request: prefill_service_pb2.CancelPrefillRequest, context: Any
    ) -> prefill_service_pb2.CancelPrefillResponse:
        """See the proto."""
        self._worker.cancel_prefill(request)
        return prefill_service_pb2.CancelPrefillResponse()

    async def StreamSteps(
        self, request: decode_service_pb2.StreamStepsRequest, context: Any
    ) -> AsyncIterator[decode_service_pb2.StreamStepsResponse]:
        """See the proto."""
        queue = self._worker.open_session(request.session_id)
        try:
            while True:
                yield await queue.get()
        finally:
            self._worker.close_session(request.session_id)

    async def Start(self, request: decode_service_pb2.StartRequest, context: Any) -> decode_service_pb2.StartResponse:
        """See the proto."""
        return await self._worker.run_sequence(request)

    async def Cancel(
        self, request: decode_service_pb2.CancelRequest, context: Any
    ) -> decode_service_pb2.CancelResponse:
        """See the proto."""
        self._worker.cancels.append(request)
        if not self._worker.faults.ignores_cancel:
            self._worker.end(request.session_id, request.sequence_number)
        return decode_service_pb2.CancelResponse()

    async def ReleaseLease(
        self, request: transfer_service_pb2.ReleaseLeaseRequest, context: Any
    ) -> transfer_service_pb2.ReleaseLeaseResponse:
        """See the proto."""
        self._worker.release(request.lease_id)
        return transfer_service_pb2.ReleaseLeaseResponse()

    async def RenewLease(
        self, request: transfer_service_pb2.RenewLeaseRequest, context: Any
    ) -> transfer_service_pb2.RenewLeaseResponse:
        """See the proto."""
        return transfer_service_pb2.RenewLeaseResponse(duration_ms=30_000)

    async def Pull(
        self, request: transfer_service_pb2.PullRequest, context: Any
    ) -> AsyncIterator[transfer_service_pb2.PullResponse]:
        """See the proto."""
        raise HeadraceError("UNSUPPORTED", "a fake worker has no bytes to move")
        yield
