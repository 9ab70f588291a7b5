"""Which ports of this machine are free. Who asks may still come too late: the process that binds has the last word."""

from __future__ import annotations

import socket
from contextlib import closing

_TRIES = 20


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError):
            return False
        return True


def next_free(port: int, count: int = 1) -> int:
    """Return the first port of `count` free ones in a row, from `port` on; 0: none of the next twenty begins such."""
    for first in range(port, port + _TRIES):
        if all(is_free(each) for each in range(first, first + count)):
            return first
    return 0
