"""How many connections a server holds, which of them make room for others, and how all of them end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_router.face.http.connection import Connection


class Connections:
    """All of a server's."""

    def __init__(self, most: int) -> None:
        self.is_draining = False
        self._most = most
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        """The one that has waited longest first."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> bool:
        """Take a connection; if there are too many, the one that has been idle longest ends; False: none is."""
        if len(self._open) >= self._most:
            if not self._idle:
                return False
            oldest = next(iter(self._idle))
            self.remove(oldest)
            oldest.abort()
        self._open.add(connection)
        return True

    def remove(self, connection: Connection) -> None:
        """Forget a connection; idempotent."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def set_idle(self, connection: Connection, is_idle: bool) -> None:
        """Take note of whether a connection waits for a request."""
        self._idle.pop(connection, None)
        if is_idle and connection in self._open:
            self._idle[connection] = None

    def drain(self) -> None:
        """Keep no connection longer than the request under way."""
        self.is_draining = True
        for connection in list(self._open):
            connection.stop_keeping_alive()

    def abort(self) -> None:
        """End them all."""
        for connection in list(self._open):
            connection.abort()
