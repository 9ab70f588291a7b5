"""Passing a descriptor to another process of the same user, over a unix socket. Event loop only.

Who may have it: a process that can reach the folder (0700), runs as the same user by the kernel's word (SO_PEERCRED),
and says the password within a second. Nobody else is answered, and what is said is never more than the password. The
connection is kept afterwards: its end tells each side that the other is gone.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

MOST_CONNECTIONS = 256
"""What comes beyond is closed at once."""
PATIENCE_S = 1.0
"""How long who connects may take to say the password."""
_PAUSE_S = 0.1
_SUFFIX = ".sock"
_MOST_FOLDER_BYTES = 64
"""Of the 107 that a socket's path may have; the rest is for its name."""
_DESCRIPTOR = struct.Struct("i")
_CREDENTIALS = struct.Struct("iII")
"""Linux's `struct ucred`: process, user, group; the numbers of users and groups have no sign."""


def private_folder() -> Path:
    """Return the folder for this user's sockets, in the temporary one; made if need be.

    Raises:
        OSError: it is another user's, open to others, or its path too long.
    """
    folder = Path(tempfile.gettempdir(), f"headrace-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user's that is closed to others (chmod 700)")
    if len(os.fsencode(folder)) > _MOST_FOLDER_BYTES:
        raise OSError(f"{folder} is too long for the path of a socket; set TMPDIR to a shorter folder")
    return folder


def peer_uid(connection: socket.socket) -> int:
    """Return the user that the process at the other end of a unix socket runs as, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1]


class DescriptorServer:
    """Passes a descriptor on, until closed. `descriptor` None: there is none yet, and nobody is answered."""

    def __init__(self, name: str, password: bytes, descriptor: Callable[[], int | None]) -> None:
        """Listen in the private folder.

        Raises:
            OSError: that can't be.
        """
        self._password = password
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._connections: dict[socket.socket, asyncio.TimerHandle] = {}
        folder = private_folder()
        _sweep(folder)
        self.path = str(folder / f"{name}{_SUFFIX}")
        self._listener = _new_socket()
        try:
            # Its name ends so only once it is listened at: one where nobody listens is swept away.
            nascent = f"{self.path}.new"
            self._listener.bind(nascent)
            self._listener.listen(MOST_CONNECTIONS)
            os.rename(nascent, self.path)
        except BaseException:
            self._listener.close()
            raise
        self._pausing: asyncio.TimerHandle | None = None
        self._listen()

    @property
    def num_connections(self) -> int:
        """Connections open, those who have yet to say the password among them."""
        return len(self._connections)

    def close(self) -> None:
        """End every connection and leave nothing behind. Idempotent."""
        if self._pausing:
            self._pausing.cancel()
        if self._listener.fileno() != -1:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            Path(self.path).unlink(missing_ok=True)
        for connection in list(self._connections):
            self._end(connection)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors left, for one: the listener would be readable all the time
            self._loop.remove_reader(self._listener)
            self._pausing = self._loop.call_later(_PAUSE_S, self._listen)
            return
        connection.setblocking(False)
        if len(self._connections) >= MOST_CONNECTIONS or peer_uid(connection) != os.geteuid():
            connection.close()
            return
        self._connections[connection] = self._loop.call_later(PATIENCE_S, self._end, connection)
        self._loop.add_reader(connection, self._hear, connection)

    def _hear(self, connection: socket.socket) -> None:
        """Hear the password, once; whatever comes then, also the end, is the end."""
        timer = self._connections[connection]
        try:
            said = connection.recv(len(self._password) + 1)
            has_been_told = timer.cancelled()
            # Only then: before anybody was offered it, there may be none to ask for.
            is_asked = not has_been_told and secrets.compare_digest(said, self._password)
            descriptor = self._descriptor() if is_asked else None
            if descriptor is None:
                self._end(connection)
                return
            socket.send_fds(connection, [b"\x01"], [descriptor])
            timer.cancel()
        except BlockingIOError:
            return
        except OSError:
            self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        self._connections.pop(connection).cancel()
        self._loop.remove_reader(connection)
        connection.close()


async def receive_descriptor(path: str, password: bytes, *, timeout_s: float) -> tuple[socket.socket, int]:
    """Return the connection to the `DescriptorServer` at `path`, and what it passed; both are the caller's to close.

    Raises:
        OSError: nobody is there, it is another user's, it passes nothing, or takes too long.
    """
    connection = _new_socket()
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(connection, path)
            if peer_uid(connection) != os.geteuid():
                raise PermissionError("another user listens there")
            connection.send(password)
            await _readable(connection)
        # Not recv_fds: it drops the flag, and a program started meanwhile would inherit the pool (Python 3.11).
        _, passed, _, _ = connection.recvmsg(1, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC)
        if not passed:
            raise ConnectionError("it passes no memory to us")
        return connection, _DESCRIPTOR.unpack(passed[0][2])[0]
    except BaseException:
        connection.close()
        raise


async def _connect(connection: socket.socket, path: str) -> None:
    while True:
        try:
            connection.connect(path)
            return
        except BlockingIOError:  # as many wait there as may
            await asyncio.sleep(0.01)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(connection)


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _sweep(folder: Path) -> None:
    """Remove sockets where nobody listens: their processes were killed."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with _new_socket() as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                pass
