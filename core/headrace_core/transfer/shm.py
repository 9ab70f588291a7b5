"""Transport `shm`: on one machine the taker maps the holder's pool and copies from there.

    taker                                     holder
      │ connect, key, incarnation ──────────────►│ same user?
      │◄──────────── descriptor of the pool ─────│ its work is done: it never copies a page
      │ sealed? the proof at its end?            │
      │ copies pages, sums each while it is hot  │

Nothing here ever writes to the taker's pages: `verify` copies from the mapping, on its thread, so who runs that knows
when nothing can land any more. Reading without asking, it may read what is no longer the sequence's: checksums and the
holder's last look, when all is here, tell. The mapping stays readable whatever becomes of the holder; the end of the
connection says that it is gone, and then nothing more is read.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import grpc.aio
import numpy as np
from headrace.v1 import types_pb2
from numpy.typing import NDArray

from headrace_core.errors import HandoffLostError, StartupError, TransferCorruptError
from headrace_core.transfer.memfd import Memfd, map_sealed
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Holding, Read, Source, UnprovenError
from headrace_core.transfer.unix import DescriptorServer, private_folder, receive_descriptor
from headrace_core.transfer.values import Run

PROOF_TIMEOUT_S = 2.0
_KEY_BYTES = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def probe() -> str:
    """See `Transport.probe`."""
    try:
        Memfd().allocate(1, 1)
        private_folder()
        host_id()
    except (OSError, StartupError) as error:
        return str(error)
    return ""


def host_id() -> str:
    """Return what names this machine since it was started; its containers have the same, and may still not meet.

    Raises:
        OSError: nothing does.
    """
    return _BOOT_ID.read_text().strip()


def _password(key: bytes, incarnation: int) -> bytes:
    return key + incarnation.to_bytes(8, "little")


class ShmHolder:
    """Passes the pool's descriptor on."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._key = secrets.token_bytes(_KEY_BYTES)
        self.server: DescriptorServer | None = None

    def offer(self) -> types_pb2.TransportOffer | None:
        """See `HolderEnd`."""
        memory = self._holding.shared()
        if memory is None or self.server is None:
            return None
        return types_pb2.TransportOffer(
            shm=types_pb2.ShmTransport(
                host=host_id(),
                socket=self.server.path,
                key=self._key,
                proof=memory.proof,
                layer_stride=memory.layer_stride,
            )
        )

    def serve(self, server: grpc.aio.Server) -> None:
        """See `HolderEnd`."""
        incarnation = self._holding.incarnation
        name, password = f"{os.getpid()}-{incarnation:016x}", _password(self._key, incarnation)
        try:
            self.server = DescriptorServer(name, password, self._descriptor)
        except OSError as error:
            raise StartupError("NO_TRANSPORT", f"shm: no socket can be listened at: {error}") from error

    def close(self) -> None:
        """See `HolderEnd`."""
        if self.server is not None:
            self.server.close()

    def _descriptor(self) -> int | None:
        memory = self._holding.shared()
        return None if memory is None else memory.descriptor


class _Pool:
    """A holder's pool, mapped, for as long as the connection to it stands."""

    def __init__(self, endpoint: str, connection: socket.socket, pages: NDArray[np.uint8]) -> None:
        self.endpoint = endpoint
        self.is_open = True
        self.pages = pages
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self.close)  # it has no more to say: this is its end

    def close(self) -> None:
        """Read no more from it; the mapping goes with its last reader. Idempotent."""
        if self.is_open:
            self.is_open = False
            self.pages = self.pages[:0].copy()
            self._loop.remove_reader(self._connection)
            self._connection.close()


class ShmTransfer:
    """A run that may be read."""

    def __init__(self, pool: _Pool, layer_stride: int, page_bytes: int, page_ids: Sequence[int]) -> None:
        self._pool = pool
        self._layer_stride = layer_stride
        self._page_bytes = page_bytes
        self._page_ids = page_ids

    @property
    def is_drained(self) -> bool:
        """See `Transfer`: nothing is under way but what the caller copies itself."""
        return True

    async def wait(self) -> Read:
        """See `Transfer`: every byte can be read."""
        self._require_open()
        return self._page

    def cancel(self) -> None:
        """See `Transfer`."""

    async def drained(self) -> None:
        """See `Transfer`."""

    def _page(self, layer: int, index: int) -> NDArray[np.uint8]:
        self._require_open()
        pages, size = self._pool.pages, self._page_bytes
        in_layer = self._page_ids[index] * size
        start = layer * self._layer_stride + in_layer
        if in_layer + size > self._layer_stride or start + size > len(pages):
            raise TransferCorruptError(
                "SHORT_READ", f"page {self._page_ids[index]} is outside {self._pool.endpoint}'s pool"
            )
        return pages[start : start + size]

    def _require_open(self) -> None:
        if not self._pool.is_open:
            raise HandoffLostError("HOLDER_LOST", "the connection to the holder was torn down")


class ShmTaker:
    """Maps the pools of holders on this machine; each stays mapped until its holder is gone."""

    def __init__(self, memory: PageMemory) -> None:
        self._page_bytes = len(memory.page_bytes(0, 0))
        self._pools: dict[bytes, _Pool] = {}
        """By their proof."""

    @property
    def endpoints(self) -> list[str]:
        """Those whose pool is mapped."""
        return [pool.endpoint for pool in self._pools.values() if pool.is_open]

    async def prove(self, source: Source) -> None:
        """See `TakerEnd`: its pool is mapped here, and has what only the holder could tell."""
        offer = source.offer.shm
        if offer.host != host_id():
            raise UnprovenError("it is on another machine")
        if self._open_pool(source) is None:
            try:
                pool = await self._map(source)
            except TimeoutError as error:
                raise UnprovenError(f"nobody answers at {offer.socket}") from error
            except OSError as error:
                raise UnprovenError(f"{offer.socket}: {error}") from error
            self._forget_ended()
            if self._open_pool(source) is None:
                self._pools[offer.proof] = pool
            else:
                pool.close()  # somebody else was faster

    def pull(self, source: Source, run: Run, page_ids: Sequence[int], *, timeout_s: float) -> ShmTransfer:
        """See `TakerEnd`. Reading takes no time of the holder's, so none is measured."""
        pool = self._open_pool(source)
        if pool is None:
            raise HandoffLostError("HOLDER_LOST", f"{source.endpoint} is gone: its connection ended")
        return ShmTransfer(pool, source.offer.shm.layer_stride, self._page_bytes, run.page_ids)

    async def disconnect(self, endpoint: str) -> None:
        """See `TakerEnd`."""
        for pool in self._pools.values():
            if pool.endpoint == endpoint:
                pool.close()
        self._forget_ended()

    async def close(self) -> None:
        """See `TakerEnd`."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _open_pool(self, source: Source) -> _Pool | None:
        pool = self._pools.get(source.offer.shm.proof)
        return pool if pool is not None and pool.is_open and pool.endpoint == source.endpoint else None

    def _forget_ended(self) -> None:
        self._pools = {proof: pool for proof, pool in self._pools.items() if pool.is_open}

    async def _map(self, source: Source) -> _Pool:
        offer = source.offer.shm
        if Path(offer.socket).parent != private_folder():
            raise PermissionError("it is not in this user's folder for sockets")
        password = _password(offer.key, source.reading.incarnation)
        connection, descriptor = await receive_descriptor(offer.socket, password, timeout_s=PROOF_TIMEOUT_S)
        try:
            pages, proof = map_sealed(descriptor)
            if proof != offer.proof:
                raise ConnectionError("what it passes is not that holder's pool")
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(descriptor)
        return _Pool(source.endpoint, connection, np.frombuffer(pages, np.uint8))
