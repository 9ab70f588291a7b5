"""What moves the bytes: our transports, as a hand-off uses them, and their raw peers. Each moves a `Size` once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
import numpy as np
import xxhash
from headrace.v1 import types_pb2
from headrace_core import rpc
from headrace_core.transfer.moving import Mover
from headrace_core.transfer.pulls import Pulls
from headrace_core.transfer.taker import MOST_PULLS
from headrace_core.transfer.transport import Reading, Source
from headrace_core.transfer.transports import TRANSPORTS
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import yield_to_steps

from tests.perf.transfer.pools import INCARNATION, PAGE_BYTES, Pool, Size
from tests.perf.transfer.serve import RAW_SERVICE

Move = Callable[[Size], Awaitable[None]]
_TIMEOUT_S = 60.0


class Contenders:
    """Every contender by name, moving into one pool of this process."""

    def __init__(self, served: dict[str, Any], sizes: tuple[Size, ...]) -> None:
        self.moves: dict[str, Move] = {}
        self._served = served
        self._pool = Pool()
        self._pool.fill()
        self._local = Pool()
        self._local.fill()
        self._runs = {size.name: size.runs(self._local) for size in sizes}
        self._verifying = ThreadPoolExecutor(1, "verify", initializer=yield_to_steps)
        self._mover = Mover(self._pool, self._verifying, _TIMEOUT_S, _TIMEOUT_S)
        self._pulls = Pulls(MOST_PULLS)
        self._takers: list[Any] = []

    async def open(self) -> None:
        """Connect to everything that is served."""
        for name, offer in self._served["offers"].items():
            taker = TRANSPORTS[name].taker(self._pool, rpc.own_channel)
            self._takers.append(taker)
            reading = Reading("lease", INCARNATION, b"")
            source = Source(self._served["address"], reading, types_pb2.TransportOffer.FromString(bytes.fromhex(offer)))
            await taker.prove(source)
            self.moves[name] = self._ours(taker, source)
            if name == "nixl":
                self.moves["raw_nixl"] = self._raw_nixl(taker, source)
        self._channel: grpc.aio.Channel = rpc.own_channel(self._served["address"])
        self.moves["raw_grpc"] = self._raw_grpc
        self.moves["raw_grpc_dropped"] = self._raw_grpc_dropped
        self._socket = socket.create_connection(("127.0.0.1", self._served["socket"]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.moves["raw_socket"] = self._raw_socket
        self.moves["memcpy_checked"] = self._memcpy_checked
        self.moves["memcpy"] = self._memcpy

    async def close(self) -> None:
        """Leave them."""
        for taker in self._takers:
            await taker.close()
        await self._channel.close()
        self._socket.close()
        self._verifying.shutdown()

    def _ours(self, taker: Any, source: Source) -> Move:
        async def move_run(run: Run) -> None:
            async with self._pulls.turn(0):
                await self._mover.move(taker, source, run, run.page_ids)

        async def move(size: Size) -> None:
            await asyncio.gather(*(move_run(run) for run in self._runs[size.name]))

        return move

    async def _raw_grpc(self, size: Size) -> None:
        pieces = self._pool.pieces(size.num_bytes)
        async for frame in self._call("Pull", size):
            next(pieces)[:] = frame

    async def _raw_grpc_dropped(self, size: Size) -> None:
        async for _ in self._call("PullMade", size):
            pass

    def _call(self, method: str, size: Size) -> Any:
        pull: Any = self._channel.unary_stream(f"/{RAW_SERVICE}/{method}")
        return pull(size.num_bytes.to_bytes(8, "little"))

    def _raw_nixl(self, taker: Any, source: Source) -> Move:
        """NIXL's own calls on the same agent and descriptors, one run after the other, nothing verified."""
        (link,) = taker._links.values()
        bases = [np.frombuffer(layer, np.uint8).ctypes.data for layer in self._pool.host_layers()]
        addresses = source.offer.nixl.layer_addresses

        def regions(run: Run, layers: Sequence[int]) -> list[tuple[int, int, int]]:
            return [
                (layers[layer] + page * PAGE_BYTES, PAGE_BYTES, 0)
                for layer in range(run.num_layers)
                for page in run.page_ids
            ]

        lists = {
            name: [(regions(run, bases), regions(run, addresses)) for run in runs] for name, runs in self._runs.items()
        }

        def read(size: Size) -> None:
            for local, remote in lists[size.name]:
                handle = link.post(local, remote)
                while not link.is_done(handle):
                    pass

        async def move(size: Size) -> None:
            await asyncio.wrap_future(taker._thread.submit(read, size))

        return move

    async def _raw_socket(self, size: Size) -> None:
        await asyncio.wrap_future(self._verifying.submit(self._receive, size))

    def _receive(self, size: Size) -> None:
        self._socket.sendall(size.num_bytes.to_bytes(8, "little"))
        for piece in self._pool.pieces(size.num_bytes):
            view = piece
            while len(view):
                view = view[self._socket.recv_into(view) :]

    async def _memcpy_checked(self, size: Size) -> None:
        await asyncio.wrap_future(self._verifying.submit(self._copy_runs, size, is_checked=True))

    async def _memcpy(self, size: Size) -> None:
        await asyncio.wrap_future(self._verifying.submit(self._copy_runs, size, is_checked=False))

    def _copy_runs(self, size: Size, *, is_checked: bool) -> None:
        """Copy the same pages, page by page, inside this process."""
        for run in self._runs[size.name]:
            for layer, sums in enumerate(run.checksums):
                for page_id, expected in zip(run.page_ids, sums, strict=True):
                    page = self._pool.page_bytes(layer, page_id)
                    source = self._local.page_bytes(layer, page_id)
                    np.copyto(np.frombuffer(page, np.uint8), np.frombuffer(source, np.uint8))
                    if is_checked:
                        assert xxhash.xxh3_64_intdigest(page) == expected
