"""A descriptor is passed to processes of this user that say the password; whoever else comes costs nobody anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.transfer import shm, unix
from headrace_core.transfer.unix import MOST_CONNECTIONS, DescriptorServer, private_folder, receive_descriptor

PASSWORD = b"p" * 24


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch) -> Path:
    """A temporary folder of the test's own, whose path is short enough for a socket's."""
    place = tmp_path_factory.mktemp("u", numbered=True)
    monkeypatch.setattr(unix.tempfile, "gettempdir", lambda: str(place))
    return place


@contextlib.asynccontextmanager
async def serving(name: str = "a", *, has_descriptor: bool = True) -> AsyncGenerator[DescriptorServer]:
    """Serve; nothing that the event loop calls may raise."""
    read, write = os.pipe()
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    server = DescriptorServer(name, PASSWORD, lambda: read if has_descriptor else None)
    try:
        yield server
    finally:
        server.close()
        os.close(read)
        os.close(write)
    assert raised == []


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def connect(server: DescriptorServer) -> socket.socket:
    client = unix._new_socket()
    client.connect(server.path)
    return client


async def is_ended(client: socket.socket) -> bool:
    """Return whether the server ended this connection without a word."""
    await unix._readable(client)
    with contextlib.suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


async def receive(server: DescriptorServer) -> None:
    connection, descriptor = await receive_descriptor(server.path, PASSWORD, timeout_s=WAIT_S)
    assert os.fstat(descriptor)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    connection.close()


@async_test
async def test_who_says_the_password_has_the_descriptor_and_nothing_is_left_afterwards(folder: Path):
    before = descriptors()
    async with serving() as server:
        assert Path(server.path).parent.stat().st_mode & 0o777 == 0o700
        for _ in range(5):
            await receive(server)
        await eventually(lambda: server.num_connections == 0, "the server saw them go")
    assert descriptors() <= before  # others' may still be closing
    assert files(folder) == []


GARBAGE = {
    "other": b"q" * 24,
    "short": b"p" * 23,
    "long": b"p" * 25,
    "much": b"p" * 100_000,
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
@async_test
async def test_who_says_something_else_is_not_answered(said: bytes):
    async with serving() as server:
        with connect(server) as client:
            client.send(said)
            assert await is_ended(client)
        await receive(server)


@async_test
async def test_who_says_nothing_or_goes_on_talking_is_left(monkeypatch):
    monkeypatch.setattr(unix, "PATIENCE_S", 0.02)
    async with serving() as server:
        with connect(server) as mute:
            assert await is_ended(mute)
        connection, descriptor = await receive_descriptor(server.path, PASSWORD, timeout_s=WAIT_S)
        os.close(descriptor)
        await asyncio.sleep(0.05)
        assert server.num_connections == 1, "who has said it may stay"
        connection.send(PASSWORD)
        assert await is_ended(connection)
        connection.close()


@async_test
async def test_who_says_the_password_and_goes_at_once_is_forgotten():
    async with serving() as server:
        with connect(server) as client:
            client.send(PASSWORD)
        await receive(server)
        await eventually(lambda: server.num_connections == 0, "both ends are seen")


@async_test
async def test_before_there_is_a_descriptor_nobody_is_answered():
    async with serving(has_descriptor=False) as server:
        with pytest.raises(ConnectionError, match="passes no memory"):
            await receive_descriptor(server.path, PASSWORD, timeout_s=WAIT_S)


@async_test
async def test_another_user_is_not_answered_and_not_told_the_password(monkeypatch):
    async with serving() as server:
        uids = [os.geteuid(), os.geteuid() + 1]
        monkeypatch.setattr(unix, "peer_uid", lambda connection: uids.pop())
        with connect(server) as client:
            client.send(PASSWORD)
            assert await is_ended(client)
        said: list[bytes] = []
        hear = server._hear

        def listen(connection: socket.socket) -> None:
            said.append(connection.recv(100, socket.MSG_PEEK))
            hear(connection)

        monkeypatch.setattr(server, "_hear", listen)
        monkeypatch.setattr(unix, "peer_uid", lambda connection: os.geteuid())
        uid_at_client = iter([os.geteuid() + 1])
        is_client = lambda connection: connection.getsockname() == ""  # noqa: E731
        monkeypatch.setattr(unix, "peer_uid", lambda it: next(uid_at_client) if is_client(it) else os.geteuid())
        with pytest.raises(PermissionError, match="another user listens there"):
            await receive_descriptor(server.path, PASSWORD, timeout_s=WAIT_S)
        await eventually(lambda: said == [b""], "the server saw it go")


@async_test
async def test_the_kernel_says_whose_a_connection_is():
    async with serving() as server:
        with connect(server) as client:
            assert unix.peer_uid(client) == os.geteuid()

    class Foreign:
        def getsockopt(self, *_: int) -> bytes:
            return struct.pack("iII", 7, 4_000_000_001, 1000)

    assert unix.peer_uid(Foreign()) == 4_000_000_001, "the user, neither the process nor the group"


@async_test
async def test_a_thousand_connections_are_bounded_and_leave_room_again(monkeypatch):
    async with serving() as server:
        clients = []
        for _ in range(1000):
            client = unix._new_socket()
            await unix._connect(client, server.path)
            clients.append(client)
        await eventually(lambda: server.num_connections == MOST_CONNECTIONS, "as many as may are there")
        ended = await asyncio.gather(*(is_ended(client) for client in clients))
        assert all(ended), "the first ones when their second was over, the others at once"
        await receive(server)
        for client in clients:
            client.close()


@async_test
async def test_without_descriptors_left_the_server_waits_until_there_are_some(monkeypatch):
    monkeypatch.setattr(unix, "_PAUSE_S", 0.01)
    async with serving() as server:
        listener, refused = server._listener, [OSError(24, "Too many open files")] * 3

        class Exhausted:
            def accept(self):
                if refused:
                    raise refused.pop()
                return listener.accept()

            def __getattr__(self, name):
                return getattr(listener, name)

        server._listener = Exhausted()
        await receive(server)
        assert refused == []


@async_test
async def test_who_never_leaves_does_not_keep_the_server_from_closing():
    before = descriptors()
    async with serving() as server:
        connection, descriptor = await receive_descriptor(server.path, PASSWORD, timeout_s=WAIT_S)
        mute = connect(server)
        await eventually(lambda: server.num_connections == 2, "both are there")
        server.close()
        assert await is_ended(connection)
        assert await is_ended(mute)
        server.close()
        connection.close()
        mute.close()
        os.close(descriptor)
    assert descriptors() <= before  # others' may still be closing


@async_test
async def test_a_server_whose_socket_somebody_swept_away_still_closes():
    async with serving() as server:
        os.unlink(server.path)


def test_a_socket_that_two_sweep_at_once_is_gone_for_both(folder: Path, monkeypatch):
    left = private_folder() / "killed.sock"
    with unix._new_socket() as killed:
        killed.bind(str(left))

    class Overtaken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, path):
            Path(path).unlink()
            raise ConnectionRefusedError

    monkeypatch.setattr(unix, "_new_socket", Overtaken)
    unix._sweep(left.parent)
    assert files(folder) == []


@async_test
async def test_a_socket_that_a_killed_process_left_is_swept_and_a_living_one_is_not():
    async with serving("living") as living:
        left = private_folder() / "killed.sock"
        with unix._new_socket() as killed:
            killed.bind(str(left))
        with pytest.raises(ConnectionRefusedError):
            await receive_descriptor(str(left), PASSWORD, timeout_s=WAIT_S)
        async with serving("next") as server:
            assert not left.exists()
            await receive(living)
            await receive(server)


@async_test
async def test_where_nobody_ever_was_nobody_is_waited_for():
    with pytest.raises(FileNotFoundError):
        await receive_descriptor("/nowhere/a.sock", PASSWORD, timeout_s=WAIT_S)


@async_test
async def test_who_is_there_and_says_nothing_is_waited_for_so_long():
    async with serving() as server:
        server._loop.remove_reader(server._listener)
        with pytest.raises(TimeoutError):
            await receive_descriptor(server.path, PASSWORD, timeout_s=0.05)


def test_a_folder_whose_path_leaves_no_room_for_a_socket_is_not_used(folder: Path, monkeypatch):
    deep = folder / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(unix.tempfile, "gettempdir", lambda: str(deep))
    with pytest.raises(OSError, match="set TMPDIR to a shorter folder"):
        private_folder()
    assert "too long" in shm.probe(), "auto does without"


@pytest.mark.parametrize(("num_bytes", "is_used"), [(64, True), (65, False)])
def test_a_folders_path_may_have_so_many_bytes(folder: Path, monkeypatch, num_bytes: int, is_used: bool):
    place = folder / ("d" * (num_bytes - len(f"{folder}//headrace-{os.geteuid()}")))
    place.mkdir()
    monkeypatch.setattr(unix.tempfile, "gettempdir", lambda: str(place))
    with contextlib.nullcontext() if is_used else pytest.raises(OSError, match="too long for the path of a socket"):
        assert len(os.fsencode(private_folder())) == num_bytes


def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch):
    other = os.geteuid() + 1
    monkeypatch.setattr(unix.os, "geteuid", lambda: other)
    with pytest.raises(PermissionError, match=f"headrace-{other} must be a folder of this user's"):
        private_folder()


def _symlink(place: Path) -> None:
    (place / "elsewhere").mkdir(mode=0o700)
    place.joinpath(f"headrace-{os.geteuid()}").symlink_to(place / "elsewhere")


def _open_to_all(place: Path) -> None:
    path = place / f"headrace-{os.geteuid()}"
    path.mkdir()
    path.chmod(0o755)


@pytest.mark.parametrize("prepare", [_symlink, _open_to_all])
def test_a_folder_that_is_not_closed_to_others_is_not_used(folder: Path, prepare: Callable[[Path], None]):
    prepare(folder)
    with pytest.raises(PermissionError, match="closed to others"):
        private_folder()


@async_test
async def test_whoever_does_not_know_the_password_is_ended_before_there_is_anything_to_pass():
    """As the other processes do that start at the same time: they look whether this one still runs."""

    asked: list[bool] = []

    def none_yet() -> int:
        asked.append(True)
        raise LookupError("there is none yet")

    server = DescriptorServer("a", PASSWORD, none_yet)
    try:
        connect(server).close()
        with connect(server) as client:
            client.sendall(b"x" * len(PASSWORD))
            assert await is_ended(client)
        await eventually(lambda: not server.num_connections, "both are ended")
        assert not asked
    finally:
        server.close()
