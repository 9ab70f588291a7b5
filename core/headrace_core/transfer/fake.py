"""Transport `fake`: both ends in one process. Ships with the product, so that every fault has a test.

A pool is named in this process's table, `POOLS`. `FakeFaults` says what goes wrong: bytes flip, the stream ends early,
nothing moves until told, or `cancel` does not stop bytes under way, as with one-sided reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.aio
from headrace.v1 import types_pb2

from headrace_core.errors import HandoffLostError, TransferCorruptError
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Holding, Source, UnprovenError
from headrace_core.transfer.values import Run


@dataclass(slots=True)
class FakeFaults:
    """What goes wrong; nothing by default."""

    has_flipped_byte: bool = False
    is_truncated: bool = False
    is_cancel_ignored: bool = False
    is_given_up: bool = False
    """`wait` raises at once, though bytes are under way, as when a transport's patience ends before they do."""
    gate: asyncio.Event | None = None
    """Bytes move only once it is set."""
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a transfer has begun."""
    pulled: list[tuple[str, Run]] = field(default_factory=list[tuple[str, Run]])
    """Every transfer that began: lease key and run."""
    num_moving: int = 0
    most_moving: int = 0
    """Transfers at a time, now and at most."""


@dataclass(slots=True)
class FakePool:
    """A holder's end."""

    holding: Holding
    faults: FakeFaults = field(default_factory=FakeFaults)


POOLS: dict[str, FakePool] = {}
"""The process's table: pools by the name that `FakeTransport.pool` offers."""


def pool_name(incarnation: int) -> str:
    """Return the name of a worker's pool."""
    return f"{incarnation:016x}"


class FakeHolder:
    """Puts a worker's pool into `POOLS`."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._name = pool_name(holding.incarnation)

    def offer(self) -> types_pb2.TransportOffer:
        """See `HolderEnd`."""
        return types_pb2.TransportOffer(fake=types_pb2.FakeTransport(pool=self._name))

    def serve(self, server: grpc.aio.Server) -> None:
        """See `HolderEnd`."""
        POOLS[self._name] = FakePool(self._holding)

    def close(self) -> None:
        """See `HolderEnd`."""
        POOLS.pop(self._name, None)


class FakeTransfer:
    """A copy under way, page by page."""

    def __init__(self, moving: asyncio.Task[None], faults: FakeFaults) -> None:
        self._moving = moving
        self._faults = faults

    @property
    def is_drained(self) -> bool:
        """See `Transfer`."""
        return self._moving.done()

    async def wait(self) -> None:
        """See `Transfer`."""
        if self._faults.is_given_up:
            raise HandoffLostError("HOLDER_LOST", "the transfer took too long")
        await asyncio.wait([self._moving])
        if self._moving.cancelled():
            raise HandoffLostError("HOLDER_LOST", "the connection to the holder was torn down")
        self._moving.result()

    def cancel(self) -> None:
        """See `Transfer`."""
        if not self._faults.is_cancel_ignored:
            self._moving.cancel()

    async def drained(self) -> None:
        """See `Transfer`."""
        await asyncio.wait([self._moving])
        if not self._moving.cancelled():
            self._moving.exception()  # seen: it is `wait`'s to raise


class FakeTaker:
    """Takes pages out of `POOLS`."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._moving: dict[str, list[asyncio.Task[None]]] = {}

    async def prove(self, source: Source) -> None:
        """See `TakerEnd`."""
        if source.offer.fake.pool not in POOLS:
            raise UnprovenError("the holder's pool is not in this process")

    def pull(self, source: Source, run: Run, page_ids: Sequence[int], *, timeout_s: float) -> FakeTransfer:
        """See `TakerEnd`."""
        pool = POOLS.get(source.offer.fake.pool)
        if pool is None:
            raise HandoffLostError("HOLDER_LOST", "the holder's pool is not in this process")
        pool.faults.pulled.append((source.reading.lease_key, run))
        moving = asyncio.ensure_future(self._move(source, run, pool, page_ids, timeout_s))
        self._moving.setdefault(source.endpoint, []).append(moving)
        moving.add_done_callback(self._moving[source.endpoint].remove)
        return FakeTransfer(moving, pool.faults)

    async def disconnect(self, endpoint: str) -> None:
        """See `TakerEnd`."""
        for moving in list(self._moving.get(endpoint, ())):
            moving.cancel()

    async def close(self) -> None:
        """See `TakerEnd`."""
        for endpoint in list(self._moving):
            await self.disconnect(endpoint)

    async def _move(self, source: Source, run: Run, pool: FakePool, page_ids: Sequence[int], timeout_s: float) -> None:
        faults = pool.faults
        faults.num_moving += 1
        faults.most_moving = max(faults.most_moving, faults.num_moving)
        faults.entered.set()
        try:
            async with asyncio.timeout(timeout_s):
                if faults.gate:
                    await faults.gate.wait()
            await self._copy(source, run, pool, page_ids)
        except TimeoutError as error:
            raise HandoffLostError("HOLDER_LOST", "the transfer took too long") from error
        finally:
            faults.num_moving -= 1

    async def _copy(self, source: Source, run: Run, pool: FakePool, page_ids: Sequence[int]) -> None:
        holder, memory = pool.holding.holder(), pool.holding.memory()
        for layer in range(run.first_layer, run.first_layer + run.num_layers):
            held = holder.held_pages(
                source.reading,
                first_layer=layer,
                num_layers=1,
                first_page=run.first_page,
                num_pages=run.num_pages,
            )
            for source_id, destination_id in zip(held, page_ids, strict=True):
                self._memory.page_bytes(layer, destination_id)[:] = memory.page_bytes(layer, source_id)
            if pool.faults.is_truncated:
                raise TransferCorruptError("SHORT_READ", "the stream ended early")
            await asyncio.sleep(0)
        if pool.faults.has_flipped_byte:
            self._memory.page_bytes(run.first_layer, page_ids[0])[0] ^= 0xFF
