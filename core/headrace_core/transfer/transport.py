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
import numpy as np
from headrace.v1 import types_pb2
from numpy.typing import NDArray

from headrace_core.transfer.connections import Connect
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.memory import MemoryKind, PageMemory
from headrace_core.transfer.values import Run


class LeaseHolder(Protocol):
    """The side that has the pages. Event loop only."""

    def held_pages(
        self, reading: Reading, *, first_layer: int, num_layers: int, first_page: int, num_pages: int
    ) -> Sequence[int]:
        """Return the pool's ids of these pages of a sequence. Called before every frame sent, and after the last.

        Raises:
            HandoffLostError: LEASE_ENDED, WORKER_RESTARTED, STALE_PAGE.
            PermissionDeniedError: WRONG_TAKER.
            TransferCorruptError: TOKENS_MISMATCH, they hold other tokens than the taker will file them under.
            InvalidRequestError: BAD_HANDOFF, they are not sealed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What a taker says when it reads: by which lease, of which process, what tokens it takes the pages for.

    `taker` is as `Order.taker`: seen by the holder, not said.
    """

    lease_key: str
    incarnation: int
    tokens_sha256: bytes
    taker: str = ""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a holder's end serves. `holder` and `memory` may raise while the worker is starting."""

    holder: Callable[[], LeaseHolder]
    memory: Callable[[], PageMemory]
    incarnation: int
    frame_bytes: int
    on_sent: Callable[[int], None]
    """Counts bytes of pages, without what frames them; where takers read by themselves, nobody does."""
    shared: Callable[[], Memfd | None] = lambda: None
    """What the pool is built on, if others can be let read it."""


class HolderEnd(Protocol):
    """The holder's end of a transport. Event loop only."""

    def offer(self) -> types_pb2.TransportOffer | None:
        """Return how a taker reaches it; None: this pool can't be reached so."""
        ...

    def serve(self, server: grpc.aio.Server) -> None:
        """Begin to serve; `server` is the worker's.

        Raises:
            StartupError: NO_TRANSPORT.
        """
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


Read = Callable[[int, int], NDArray[np.uint8]]
"""Gives the bytes, [page bytes], of (layer, index of the page in the run) where the holder has them. Any thread.

Raises:
    HandoffLostError: the holder is gone.
    TransferCorruptError: SHORT_READ, there is no such page.
"""


class Transfer(Protocol):
    """Bytes on their way into destination pages. Started by `TakerEnd.pull`."""

    @property
    def is_drained(self) -> bool:
        """Whether it is known that it lets no byte land any more, whatever became of it."""
        ...

    async def wait(self) -> Read | None:
        """Return when every byte arrived; or how to read them in place, when the caller copies them itself.

        Cancelling the wait does not cancel the transfer.

        Raises:
            HandoffLostError: the holder refused or is gone, or time ran out.
            TransferCorruptError: TOKENS_MISMATCH, SHORT_READ.
        """
        ...

    def cancel(self) -> None:
        """Begin to stop; bytes may land until `drained` returns. No effect on a finished transfer."""
        ...

    async def drained(self) -> None:
        """Return when `is_drained`."""
        ...


class UnprovenError(Exception):
    """Bytes can't come this way from that holder; says why. Another offer may do."""


class TakerEnd(Protocol):
    """The taker's end of a transport. Event loop only."""

    async def prove(self, source: Source) -> None:
        """Find out whether bytes can come this way, with no more than is needed; nothing if that is known.

        Raises:
            UnprovenError: they can't.
        """
        ...

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
    """One way to move bytes: both ends, the memory that the holder's pool must be of, what speaks against it here.

    `probe` returns why no worker on this machine could use it; empty: nothing is known that speaks against it.
    """

    holder: Callable[[Holding], HolderEnd]
    taker: Callable[[PageMemory, Connect], TakerEnd]
    """Made of the memory that it takes pages into, and of what connects to other workers' servers."""
    memory: MemoryKind = MemoryKind.PLAIN
    probe: Callable[[], str] = lambda: ""
    is_automatic: bool = True
    """Whether `auto` uses it."""
    is_guarded: bool = True
    """Whether only who was given an offer can read, and nobody on the way; else `auto` has it without TLS alone."""


def offer_name(offer: types_pb2.TransportOffer) -> str:
    """Return the transport's name: the field set in the offer's `oneof`; empty for one this version does not know."""
    return offer.WhichOneof("transport") or ""
