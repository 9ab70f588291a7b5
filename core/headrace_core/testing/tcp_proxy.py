"""Stands between two ends of TCP connections and can hold up everything between them, as a broken network does."""

from __future__ import annotations

import asyncio
import contextlib

_CHUNK_BYTES = 1 << 16


class TcpProxy:
    """Passes on what comes to `address` to `target`, which may be set later. Event loop only; `close` must follow."""

    def __init__(self) -> None:
        self.address = ""
        self.target = ""
        self._server: asyncio.Server | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1") -> None:
        """Listen at a port that the kernel chooses."""
        self._server = await asyncio.start_server(self._on_connected, host, 0)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def freeze(self) -> None:
        """Let nothing through, either way, and close nothing; who connects now waits, too."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Let everything through, what waited first."""
        self._thawed.set()

    async def close(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._server is not None:
            await self._server.wait_closed()

    def _on_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._pass_on(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            await self._thawed.wait()
            host, _, port = self.target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(far_writer):
                ways = [
                    asyncio.ensure_future(way)
                    for way in (self._pump(reader, far_writer), self._pump(far_reader, writer))
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.wait(ways)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while content := await reader.read(_CHUNK_BYTES):
                await self._thawed.wait()
                writer.write(content)
                await writer.drain()
            await self._thawed.wait()
