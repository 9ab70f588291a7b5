"""Transport `fake`: both ends in one process. Ships with the product, so that every fault has a test.

A pool is named in this process's table, `POOLS`. `FakeFaults` says what goes wrong: bytes flip, the stream ends early,
nothing moves until told, or `cancel` does not stop bytes under way, as with one-sided reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.v1 import types_pb2

from headrace_core.errors import HandoffLostError, TransferCorruptError
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transport import LeaseHolder, PageMemory


@dataclass(slots=True)
class FakeFaults:
    """What goes wrong; nothing by default."""

    has_flipped_byte: bool = False
    is_truncated: bool = False
    is_cancel_ignored: bool = False
    gate: asyncio.Event | None = None
    """Bytes move only once it is set."""
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a transfer has begun."""


@dataclass(slots=True)
class FakePool:
    """A holder's end."""

    holder: LeaseHolder
    memory: PageMemory
    faults: FakeFaults = field(default_factory=FakeFaults)


POOLS: dict[str, FakePool] = {}
"""The process's table: pools by the name that `FakeTransport.pool` offers."""


def fake_offer(name: str) -> types_pb2.TransportOffer:
    """Return the offer that goes into tickets."""
    return types_pb2.TransportOffer(fake=types_pb2.FakeTransport(pool=name))


class FakeTransfer:
    """A copy under way, page by page."""

    def __init__(self, moving: asyncio.Task[None], faults: FakeFaults) -> None:
        self._moving = moving
        self._faults = faults

    async def wait(self) -> None:
        """See `Transfer`."""
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


class FakeTransport:
    """Takes pages out of `POOLS`."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self._moving: dict[str, list[asyncio.Task[None]]] = {}

    def pull(self, ticket: Ticket, page_ids: Sequence[int], *, timeout_s: float) -> FakeTransfer:
        """See `Transport`."""
        pool = self._pool(ticket)
        moving = asyncio.ensure_future(self._move(ticket, pool, page_ids, timeout_s))
        self._moving.setdefault(ticket.holder_endpoint, []).append(moving)
        moving.add_done_callback(self._moving[ticket.holder_endpoint].remove)
        return FakeTransfer(moving, pool.faults)

    async def renew(self, ticket: Ticket, *, timeout_s: float) -> float:
        """See `Transport`."""
        return self._pool(ticket).holder.renew(ticket.lease_id, incarnation=ticket.holder_incarnation)

    async def release(self, ticket: Ticket, *, timeout_s: float) -> None:
        """See `Transport`."""
        self._pool(ticket).holder.release(ticket.lease_id, incarnation=ticket.holder_incarnation)

    async def disconnect(self, endpoint: str) -> None:
        """See `Transport`."""
        for moving in list(self._moving.get(endpoint, ())):
            moving.cancel()

    async def close(self) -> None:
        """See `Transport`."""
        for endpoint in list(self._moving):
            await self.disconnect(endpoint)

    async def _move(self, ticket: Ticket, pool: FakePool, page_ids: Sequence[int], timeout_s: float) -> None:
        pool.faults.entered.set()
        try:
            async with asyncio.timeout(timeout_s):
                if pool.faults.gate:
                    await pool.faults.gate.wait()
        except TimeoutError as error:
            raise HandoffLostError("HOLDER_LOST", "the transfer took too long") from error
        for layer in range(ticket.layout.num_layers):
            held = pool.holder.held_pages(
                ticket.lease_id,
                attempt=ticket.attempt,
                incarnation=ticket.holder_incarnation,
                tokens_sha256=ticket.tokens_sha256,
            )
            for source, destination in zip(held, page_ids, strict=True):
                self._memory.page_bytes(layer, destination)[:] = pool.memory.page_bytes(layer, source)
            if pool.faults.is_truncated:
                raise TransferCorruptError("SHORT_READ", "the stream ended early")
            await asyncio.sleep(0)
        if pool.faults.has_flipped_byte:
            self._memory.page_bytes(0, page_ids[0])[0] ^= 0xFF

    def _pool(self, ticket: Ticket) -> FakePool:
        for offer in ticket.offers:
            if offer.HasField("fake") and offer.fake.pool in POOLS:
                return POOLS[offer.fake.pool]
        raise HandoffLostError("HOLDER_LOST", "the ticket's pool is not in this process")
