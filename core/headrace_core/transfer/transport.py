"""What moves pages: the seams between hand-off and transport.

The holder `offer`s its pages by every transport it serves; the taker chooses one, `pull`s, and keeps the lease alive
with `renew` until it has verified the bytes; then it `release`s. A transport only moves bytes: whether they are the
right ones is decided by `verify`, after they arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from headrace.v1 import types_pb2

from headrace_core.transfer.ticket import Ticket


class PageMemory(Protocol):
    """Memory of a page pool, as `KvCache` has it."""

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """Return one page of one layer: contiguous, writable, no copy."""
        ...

    def copy_to_host(self, page_ids: Sequence[int]) -> None:
        """Let `page_bytes` show what was computed into these pages. Not on the event loop."""
        ...

    def copy_from_host(self, page_ids: Sequence[int]) -> None:
        """Let what was written to `page_bytes` of these pages be computed with. Not on the event loop."""
        ...


class LeaseHolder(Protocol):
    """The side that has the pages. Event loop only; every method is fenced by incarnation."""

    def held_pages(self, lease_id: str, *, attempt: int, incarnation: int, tokens_sha256: bytes) -> Sequence[int]:
        """Return the lease's pages, in order. Called before every frame that is sent, and after the last.

        Raises:
            HandoffLostError: LEASE_EXPIRED, WORKER_RESTARTED, STALE_ATTEMPT, STALE_PAGE.
            TransferCorruptError: TOKENS_MISMATCH, they hold other tokens than the taker will file them under.
        """
        ...

    def renew(self, lease_id: str, *, incarnation: int) -> float:
        """Start the lease's duration anew; return it, seconds.

        Raises:
            HandoffLostError: LEASE_EXPIRED, WORKER_RESTARTED.
        """
        ...

    def release(self, lease_id: str, *, incarnation: int) -> None:
        """End the lease: its pages were taken. An unknown lease is no error.

        Raises:
            HandoffLostError: WORKER_RESTARTED.
        """
        ...


class Transfer(Protocol):
    """Bytes on their way into destination pages. Started by `Transport.pull`."""

    async def wait(self) -> None:
        """Return when every byte arrived. Cancelling the wait does not cancel the transfer.

        Raises:
            HandoffLostError: the holder refused or is gone, or time ran out.
            TransferCorruptError: TOKENS_MISMATCH, SHORT_READ.
        """
        ...

    def cancel(self) -> None:
        """Begin to stop; bytes may land until `drained` returns. No effect on a finished transfer."""
        ...

    async def drained(self) -> None:
        """Return when no byte can land any more, whatever became of the transfer."""
        ...


class Transport(Protocol):
    """One way to take pages from their holder. Event loop only. Calls carry deadlines, seconds."""

    def pull(self, ticket: Ticket, page_ids: Sequence[int], *, timeout_s: float) -> Transfer:
        """Start to move the ticket's pages, all layers, into `page_ids` of the memory given at construction."""
        ...

    async def renew(self, ticket: Ticket, *, timeout_s: float) -> float:
        """Renew the ticket's lease; return its duration, seconds.

        Raises:
            HandoffLostError: the lease or its holder is gone.
            HeadraceError: the holder could not be asked.
        """
        ...

    async def release(self, ticket: Ticket, *, timeout_s: float) -> None:
        """End the ticket's lease.

        Raises:
            HeadraceError: the holder could not be asked; the lease will expire.
        """
        ...

    async def disconnect(self, endpoint: str) -> None:
        """Tear down the connection to `endpoint`: afterwards every transfer from it is drained."""
        ...

    async def close(self) -> None:
        """Tear down every connection."""
        ...


def offer_name(offer: types_pb2.TransportOffer) -> str:
    """Return the transport's name: the field set in the offer's `oneof`; empty for one this version does not know."""
    return offer.WhichOneof("transport") or ""
