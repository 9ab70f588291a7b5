"""Channels to the holders of pages: opened when first needed, shared by their users, closed when nobody needs them.

    a connection:  USED ──last user gone──► IDLE ──a user──► USED
                    │                        └──idle too long, too many idle, or broken──► CLOSED
                    └──disconnect──► CLOSED

Whether an address may be dialed at all, `connect` decides, once for each connection.

gRPC keeps trying to reach a peer that is gone, so each endpoint that a ticket ever named would cost CPU for good. One
that somebody uses is never closed, unless by `disconnect`, whose purpose that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from headrace_core import rpc

IDLE_S = 30.0
"""How long a connection stays open that nobody uses: the next hand-off from a holder that is busy comes sooner."""
MOST_IDLE = 32

Connect = Callable[[str], Awaitable[grpc.aio.Channel]]
"""Opens a channel to the worker at `host:port`, or raises the `HeadraceError` that says why not."""

_BROKEN = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


async def connect_to_any(endpoint: str) -> grpc.aio.Channel:
    """Connect to whatever address; a `Connect` for tests."""
    return rpc.own_channel(endpoint)


@dataclass(slots=True, eq=False)
class _Connection:
    endpoint: str
    channel: grpc.aio.Channel
    num_users: int = 0
    idle_since_s: float = 0.0


class Connections:
    """See the module. Event loop only. Tests give another `connect` and `clock`."""

    def __init__(
        self,
        *,
        idle_s: float = IDLE_S,
        most_idle: int = MOST_IDLE,
        connect: Connect = connect_to_any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_s = idle_s
        self._most_idle = most_idle
        self._connect = connect
        self._clock = clock
        self._open: dict[str, _Connection] = {}
        """Idle ones in the order in which they became idle."""
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def endpoints(self) -> list[str]:
        """Those with an open connection."""
        return list(self._open)

    @contextlib.asynccontextmanager
    async def use(self, endpoint: str) -> AsyncGenerator[grpc.aio.Channel]:
        """Give a channel to `host:port`; it stays open until the context ends. Raises what `connect` does."""
        connection = self._open.get(endpoint)
        if connection is None:
            channel = await self._connect(endpoint)
            connection = self._open.get(endpoint)
            if connection is None:
                connection = self._open[endpoint] = _Connection(endpoint, channel)
            else:
                await channel.close()  # somebody else was faster
        connection.num_users += 1
        try:
            yield connection.channel
        finally:
            connection.num_users -= 1
            if not connection.num_users and self._open.get(endpoint) is connection:
                self._on_idle(connection)

    def close_idle(self) -> None:
        """Close what nobody used for too long, and the longest unused ones if there are too many."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        idle = [connection for connection in self._open.values() if not connection.num_users]
        num_surplus = len(idle) - self._most_idle
        now_s = self._clock()
        for index, connection in enumerate(idle):
            if index < num_surplus or now_s - connection.idle_since_s >= self._idle_s:
                self._close(connection)
            elif self._timer is None:
                left_s = connection.idle_since_s + self._idle_s - now_s
                self._timer = asyncio.get_running_loop().call_later(left_s, self.close_idle)

    async def disconnect(self, endpoint: str) -> None:
        """Close the connection to `endpoint`, used or not; its calls end."""
        connection = self._open.get(endpoint)
        if connection:
            await asyncio.shield(self._close(connection))

    async def close(self) -> None:
        """Close every connection."""
        for connection in list(self._open.values()):
            self._close(connection)
        self.close_idle()  # nothing is left: ends the timer
        await asyncio.gather(*self._closing)

    def _on_idle(self, connection: _Connection) -> None:
        if connection.channel.get_state() in _BROKEN:
            self._close(connection)
            return
        connection.idle_since_s = self._clock()
        self._open[connection.endpoint] = self._open.pop(connection.endpoint)
        if self._timer is None or len(self._open) > self._most_idle:
            self.close_idle()

    def _close(self, connection: _Connection) -> asyncio.Task[None]:
        del self._open[connection.endpoint]
        closing = asyncio.create_task(connection.channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing
