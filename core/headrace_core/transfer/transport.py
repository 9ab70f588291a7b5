"""What moves bytes: the seam between hand-off and transport.

The holder's end says how it can be read (`offer`) and serves it; the taker's end `pull`s sealed runs into pages of its
own. A transport only moves bytes: whose pages they are is the lease's business, whether they are the right ones is
decided by `verify`, after they arrived, and who may have them when is said on another connection, by `hold`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
from headrace.v1 import types_pb2

from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.values import Run


class LeaseHolder(Protocol):
    """The side that has the pages. Event loop only."""

    def held_pages(
        self, reading: Reading, *, first_layer: int, num_layers: int, first_page: int, num_pages: int
    ) -> Sequence[int]:
        """Return the pool's ids of these pages of a sequence. Called before every frame sent, and after the last.

        Raises:
            HandoffLostError: LEASE_ENDED, WORKER_RESTARTED, STALE_PAGE.
            TransferCorruptError: TOKENS_MISMATCH, they hold other tokens than the taker will file them under.
            InvalidRequestError: BAD_HANDOFF, they are not sealed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What a taker says when it reads: by which lease, of which process, what tokens it takes the pages for."""

    lease_key: str
    incarnation: int
    tokens_sha256: bytes


@dataclass(frozen=True, slots=True)
class Holding:
    """What a holder's end serves. `holder` and `memory` may raise while the worker is starting."""

    holder: Callable[[], LeaseHolder]
    memory: Callable[[], PageMemory]
    incarnation: int
    frame_bytes: int
    on_sent: Callable[[int], None]
    """Counts bytes."""


class HolderEnd(Protocol):
    """The holder's end of a transport. Event loop only."""

    def offer(self) -> types_pb2.TransportOffer:
        """Return how a taker reaches it."""
        ...

    def serve(self, server: grpc.aio.Server) -> None:
        """Begin to serve; `server` is the worker's."""
        ...

    def close(self) -> None:
        """Serve no more."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where a run's bytes are, and by which lease."""

    endpoint: str
    reading: Reading
    offer: types_pb2.TransportOffer


class Transfer(Protocol):
    """Bytes on their way into destination pages. Started by `TakerEnd.pull`."""

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


class TakerEnd(Protocol):
    """The taker's end of a transport. Event loop only."""

    def pull(self, source: Source, run: Run, page_ids: Sequence[int], *, timeout_s: float) -> Transfer:
        """Start to move a run into as many `page_ids`, same layers, of the memory given at construction."""
        ...

    async def disconnect(self, endpoint: str) -> None:
        """Tear down the connection to `endpoint`: afterwards every transfer from it is drained."""
        ...

    async def close(self) -> None:
        """Tear down every connection."""
        ...


@dataclass(frozen=True, slots=True)
class Transport:
    """Both ends of one way to move bytes."""

    holder: Callable[[Holding], HolderEnd]
    taker: Callable[[PageMemory], TakerEnd]


def offer_name(offer: types_pb2.TransportOffer) -> str:
    """Return the transport's name: the field set in the offer's `oneof`; empty for one this version does not know."""
    return offer.WhichOneof("transport") or ""
