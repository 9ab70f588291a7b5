"""gRPC surface of the prefill worker: decode, delegate, encode."""

from __future__ import annotations

from typing import Any, Protocol

import grpc.aio
from headrace.v1 import prefill_service_pb2, prefill_service_pb2_grpc
from headrace_core.batch.spec import SequenceSpec
from headrace_core.transfer.ticket import Ticket, encode_ticket
from headrace_core.wire import decode_sampling, encode_finish

from headrace_prefill.scheduler import Prefilled

PREFILL_SERVICE = "headrace.v1.PrefillService"


class Outcome(Protocol):
    """What a prefill answers."""

    @property
    def ticket(self) -> Ticket:
        """What the decode worker gets."""
        ...

    @property
    def prefilled(self) -> Prefilled:
        """What the router gets."""
        ...


class Prefiller(Protocol):
    """Whom the servicer delegates to."""

    async def prefill(self, spec: SequenceSpec) -> Outcome:
        """Prefill one sequence and hold its pages under a lease."""
        ...

    def cancel(self, request_id: str, *, sample_index: int, attempt: int) -> None:
        """Abort this and earlier attempts of a sample."""
        ...


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """Adapts `PrefillService` to the worker."""

    def __init__(self, prefiller: Prefiller) -> None:
        self._prefiller = prefiller

    async def Prefill(
        self, request: prefill_service_pb2.PrefillRequest, context: Any
    ) -> prefill_service_pb2.PrefillResponse:
        """See `prefill_service.proto`."""
        spec = SequenceSpec(
            request_id=request.request_id,
            attempt=request.attempt,
            sample_index=request.sample_index,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            params=decode_sampling(request.sampling),
        )
        outcome = await self._prefiller.prefill(spec)
        prefilled = outcome.prefilled
        return prefill_service_pb2.PrefillResponse(
            handoff=encode_ticket(outcome.ticket),
            finish_reason=encode_finish(prefilled.finish),
            num_cached_tokens=prefilled.num_cached_tokens,
            queue_us=round(prefilled.queue_s * 1e6),
            compute_us=round(prefilled.compute_s * 1e6),
        )

    async def CancelPrefill(
        self, request: prefill_service_pb2.CancelPrefillRequest, context: Any
    ) -> prefill_service_pb2.CancelPrefillResponse:
        """See `prefill_service.proto`."""
        self._prefiller.cancel(request.request_id, sample_index=request.sample_index, attempt=request.attempt)
        return prefill_service_pb2.CancelPrefillResponse()


def add_prefill_servicer(prefiller: Prefiller, server: grpc.aio.Server) -> None:
    """Register the service."""
    prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(prefiller), server)
