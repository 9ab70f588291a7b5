"""Both ends of any transport of the table, with the thread that verifies: what a hand-off does with one run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from headrace.v1 import types_pb2
from headrace_core.request import hash_tokens
from headrace_core.rpc import Server
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.handoff_parts import INCARNATION, PlainMemory, StubHolder, holding, run_of
from headrace_core.transfer.connections import connect_to_any
from headrace_core.transfer.grpc import SERVICE
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.moving import Mover
from headrace_core.transfer.transport import Reading, Source
from headrace_core.transfer.transports import TRANSPORTS
from headrace_core.transfer.values import Run

PAGES = (5, 0, 3)
PLACES = (1, 2, 7)
READING = Reading("lease-1", INCARNATION, hash_tokens(range(12)))


class Pair:
    """A holder that serves, and a taker that takes into `memory`."""

    def __init__(self, name: str, holder: StubHolder | None = None, *, page_bytes: int = 64) -> None:
        transport = TRANSPORTS[name]
        self.shared = new_memory(transport.memory)
        self.source = PlainMemory(seed=1, shared=self.shared, page_bytes=page_bytes)
        self.memory = PlainMemory(seed=2, page_bytes=page_bytes)
        self.verifying = ThreadPoolExecutor(1)
        self.mover = Mover(self.memory, self.verifying, WAIT_S, WAIT_S)
        served = holding(
            holder or StubHolder(PAGES),
            self.source,
            frame_bytes=100,
            on_sent=lambda _: None,
            shared=self.shared,
        )
        self.holder: Any = transport.holder(served)
        self.taker: Any = transport.taker(self.memory, connect_to_any)
        self.address = ""

    def offered(self, change: Any = lambda offer: None) -> Source:
        offer = types_pb2.TransportOffer()
        offer.CopyFrom(self.holder.offer())
        change(offer)
        return Source(self.address, READING, offer)

    def run(self) -> Run:
        return run_of(self.source, PAGES)

    async def move(self, run: Run | None = None, page_ids: Sequence[int] = PLACES) -> None:
        source = self.offered()
        await self.taker.prove(source)
        await self.mover.move(self.taker, source, run or self.run(), page_ids)


def of_other_bytes(run: Run, *, layer: int, index: int) -> Run:
    """Return the run as if this page had had other bytes when it was sealed."""
    sums = [list(sums) for sums in run.checksums]
    sums[layer][index] ^= 1
    return replace(run, checksums=tuple(tuple(layer_sums) for layer_sums in sums))


@contextlib.asynccontextmanager
async def pair(name: str, holder: StubHolder | None = None, *, page_bytes: int = 64) -> AsyncGenerator[Pair]:
    it = Pair(name, holder, page_bytes=page_bytes)
    server = Server([SERVICE])
    it.holder.serve(server.grpc)
    it.address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield it
    finally:
        await it.taker.close()
        it.holder.close()
        await server.stop(0)
        it.verifying.shutdown()
