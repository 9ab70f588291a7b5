"""Listens for HTTP: connections, their certificates, their end."""

from __future__ import annotations

import asyncio
import logging
import resource

from headrace_core.address import parse_address
from headrace_core.authority import ServerTls
from headrace_core.errors import StartupError

from headrace_router.face.http.connection import App, Connection
from headrace_router.face.http.connections import Connections

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 4096
_HANDSHAKE_TIMEOUT_S = 5.0
_BACKLOG = 1024
_POLL_S = 0.01


class HttpServer:
    """Event loop only."""

    def __init__(self, app: App, *, tls: ServerTls | None, shares_port: bool = False) -> None:
        """Args: `shares_port`: other processes of this user may bind its port, too, and get some of the connections."""
        self._shares_port = shares_port
        self._app = app
        self._tls = tls
        self._connections = Connections(_max_connections())
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> str:
        """Listen at `host:port` (port 0: the kernel chooses); return the address with the port.

        Raises:
            StartupError: BIND.
        """
        address = parse_address(listen, least_port=0)
        if self._tls is None and not address.is_loopback:
            log.warning("anybody who reaches this address may call, in clear text; set --tls", extra={"http": listen})
        loop = asyncio.get_running_loop()
        context = self._tls.files.server_context() if self._tls else None
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._app, self._connections),
                address.host,
                address.port,
                backlog=_BACKLOG,
                reuse_port=self._shares_port,
                ssl=context,
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S if context else None,
            )
        except OSError as error:
            raise StartupError("BIND", f"can't listen on {listen} for HTTP: {error.strerror or error}") from error
        port = self._server.sockets[0].getsockname()[1]
        return f"{listen.rpartition(':')[0]}:{port}"

    def drain(self) -> None:
        """Keep no connection longer than the request under way; who connects is still answered."""
        self._connections.drain()

    async def stop(self, grace_s: float) -> None:
        """Take no connection any more; those there are have `grace_s` seconds to send what was written."""
        if self._server is not None:
            self._server.close()
        self._connections.drain()
        deadline_s = asyncio.get_running_loop().time() + grace_s
        while len(self._connections) and asyncio.get_running_loop().time() < deadline_s:  # noqa: ASYNC110 - once a life
            await asyncio.sleep(_POLL_S)
        self._connections.abort()


def _max_connections() -> int:
    """Return how many clients may be connected: never so many that no file can be opened any more."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(_MAX_CONNECTIONS, files // 4)
