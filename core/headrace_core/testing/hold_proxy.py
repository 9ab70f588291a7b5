"""Stands between a taker and a holder and changes what they say, for tests of what each makes of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc
import grpc.aio
from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import hold_service_pb2_grpc

from headrace_core.rpc import channel


class HoldProxy:
    """Serves `HoldService` at `address` by asking the holder at `holder`; use as an async context.

    `rewrite` changes an event in place, may drop it or put others in its place; `gates` hold back events of a kind
    until they are set. Beats pass unless `is_silent`.
    """

    def __init__(self, holder: str) -> None:
        self._holder = holder
        self._server = grpc.aio.server()
        self.address = ""
        self.rewrite: Callable[[pb.HoldResponse], list[pb.HoldResponse | bytes]] = lambda event: [event]
        self.rewrite_open: Callable[[pb.Open], None] = lambda message: None
        self.gates: dict[str, asyncio.Event] = {}
        self.is_silent = False
        self.seen: list[str] = []
        """Kinds of the events that came from the holder."""
        self.opened: list[pb.Open] = []
        self.peers: list[str] = []
        self.num_open = 0
        self.num_beats = 0

    async def __aenter__(self) -> Self:
        handlers: dict[str, Any] = {
            "Hold": grpc.stream_stream_rpc_method_handler(self._hold, pb.HoldRequest.FromString, _serialize)
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("headrace.v1.HoldService", handlers),)
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._channel = channel(self._holder)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        await self._channel.close()

    async def _hold(
        self, requests: AsyncIterator[pb.HoldRequest], context: Any
    ) -> AsyncIterator[pb.HoldResponse | bytes]:
        self.num_open += 1
        self.peers.append(context.peer())
        stub: Any = hold_service_pb2_grpc.HoldServiceStub(self._channel)
        call = stub.Hold(self._forward(requests))
        try:
            async for event in call:
                kind = event.WhichOneof("event") or "beat"
                if kind == "beat":
                    self.num_beats += 1
                    if not self.is_silent:
                        yield event
                    continue
                self.seen.append(kind)
                if kind in self.gates:
                    await self.gates[kind].wait()
                for changed in self.rewrite(event):
                    yield changed
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details(), tuple(error.trailing_metadata() or ()))
        finally:
            call.cancel()
            self.num_open -= 1

    async def _forward(self, requests: AsyncIterator[pb.HoldRequest]) -> AsyncIterator[pb.HoldRequest]:
        async for request in requests:
            if request.HasField("open"):
                self.rewrite_open(request.open)
                self.opened.append(request.open)
            yield request


def _serialize(message: pb.HoldResponse | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def changing(kind: str, change: Callable[[Any], None]) -> Callable[[pb.HoldResponse], list[pb.HoldResponse | bytes]]:
    """Return a rewrite that lets `change` change the events of a kind."""

    def rewrite(event: pb.HoldResponse) -> list[pb.HoldResponse | bytes]:
        if event.HasField(kind):  # pyright: ignore[reportArgumentType]
            change(getattr(event, kind))
        return [event]

    return rewrite
