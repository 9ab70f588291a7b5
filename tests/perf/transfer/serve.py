"""The other process of the bench: one pool, served by our transports' holders and by their raw peers.

    python -m tests.perf.transfer.serve TRANSPORT...

Writes one line of JSON: offers, address and port. Ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import uvloop
from headrace_core.process import keep_freed_memory
from headrace_core.rpc import Server
from headrace_core.transfer.grpc import SERVICE
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.transport import Holding
from headrace_core.transfer.transports import TRANSPORTS

from tests.perf.transfer.pools import FRAME_BYTES, INCARNATION, EveryPage, Pool

RAW_SERVICE = "raw.Peer"


def main() -> None:
    """Serve until stdin ends."""
    keep_freed_memory()
    uvloop.run(_serve())


async def _serve() -> None:
    shared = Memfd()
    pool = Pool(shared)
    pool.fill()
    server = Server([SERVICE])
    _add_raw(server.grpc, pool)
    offers: dict[str, str] = {}
    ends: list[Any] = []
    for name in sys.argv[1:]:
        end = TRANSPORTS[name].holder(_holding(pool, shared))
        end.serve(server.grpc)
        ends.append(end)
        offer = end.offer()
        if offer is not None:
            offers[name] = offer.SerializeToString().hex()
    address = server.bind("127.0.0.1:0")
    await server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_socket, args=(listener, pool), daemon=True).start()
    line = {"offers": offers, "address": address, "socket": listener.getsockname()[1], "argv": sys.orig_argv}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for end in ends:
        end.close()
    await server.stop(0)


def _holding(pool: Pool, shared: Memfd) -> Holding:
    holder = EveryPage()
    return Holding(
        holder=lambda: holder,
        memory=lambda: pool,
        incarnation=INCARNATION,
        frame_bytes=FRAME_BYTES,
        on_sent=lambda _: None,
        shared=lambda: shared,
    )


def _add_raw(server: grpc.aio.Server, pool: Pool) -> None:
    """What gRPC itself costs: frames copied out of the pool, as it takes nothing but `bytes`; or made already."""
    frames = [bytes(piece) for piece in pool.pieces(1 << 40)]

    async def pull(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for piece in pool.pieces(int.from_bytes(request, "little")):
            yield bytes(piece)

    async def pull_made(request: bytes, context: Any) -> AsyncIterator[bytes]:
        left = int.from_bytes(request, "little")
        for frame in frames:
            if left <= 0:
                break
            yield frame if left >= len(frame) else frame[:left]
            left -= len(frame)

    handlers: dict[str, Any] = {
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
        "PullMade": grpc.unary_stream_rpc_method_handler(pull_made),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RAW_SERVICE, handlers),))


def _serve_socket(listener: socket.socket, pool: Pool) -> None:
    """To who says how many bytes, send so many; one connection."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        request = connection.recv(8, socket.MSG_WAITALL)
        if len(request) < 8:
            return
        for piece in pool.pieces(int.from_bytes(request, "little")):
            connection.sendall(piece)


if __name__ == "__main__":
    main()
