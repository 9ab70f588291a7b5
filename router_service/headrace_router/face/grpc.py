"""The router's gRPC face: decode, delegate, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from headrace.v1 import generation_service_pb2, generation_service_pb2_grpc
from headrace_core.door import Door

from headrace_router.callers.caller import caller_of
from headrace_router.callers.keys import Keys
from headrace_router.router import Router


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """Serves clients. Event loop only."""

    def __init__(self, router: Router, door: Door, keys: Keys | None) -> None:
        self._router = router
        self._caller_of = keys.caller_of if keys else caller_of
        self._door = door

    async def Generate(
        self, request: generation_service_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_service_pb2.GenerateResponse]:
        """Serve one request; see generation_service.proto."""
        running = await self._router.open(
            request,
            self._caller_of(context),
            context.time_remaining(),
            metadata=context.invocation_metadata() or (),
            on_failed=lambda: self._door.forget_message(context),
        )
        del request  # it may be large, and nobody needs it any more

        def on_done(_: Any) -> None:
            self._router.close(running)

        context.add_done_callback(on_done)
        try:
            async for response in running.responses():
                yield response
        finally:
            self._router.close(running)

    async def GetServerInfo(
        self, request: generation_service_pb2.GetServerInfoRequest, context: Any
    ) -> generation_service_pb2.GetServerInfoResponse:
        """Say what is served and by whom."""
        del request, context
        return self._router.info()
