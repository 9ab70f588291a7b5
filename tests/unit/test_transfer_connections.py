"""A holder that is gone costs nothing for long: its channel is closed, and none that somebody uses."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from headrace_core.errors import PermissionDeniedError
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.transfer.connections import Connections

READY = grpc.ChannelConnectivity.READY


class FakeChannel:
    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.state = READY
        self.is_closed = False

    def get_state(self):
        assert not self.is_closed
        return self.state

    async def close(self):
        assert not self.is_closed, "closed once"
        self.is_closed = True


class Book:
    """Connections over fake channels, with a clock that a test sets."""

    def __init__(self, **options):
        self.now_s = 0.0
        self.channels = []
        self.connections = Connections(connect=self._connect, clock=lambda: self.now_s, **options)

    async def _connect(self, endpoint):
        self.channels.append(FakeChannel(endpoint))
        return self.channels[-1]

    async def touch(self, *endpoints):
        for endpoint in endpoints:
            async with self.connections.use(endpoint):
                pass

    @property
    def num_open(self):
        return sum(not channel.is_closed for channel in self.channels)


@async_test
async def test_users_of_one_endpoint_share_a_channel_that_stays_for_the_next():
    book = Book()
    async with book.connections.use("a:1") as first, book.connections.use("a:1") as second:
        assert first is second
    await book.touch("a:1")
    assert [channel.endpoint for channel in book.channels] == ["a:1"]
    await book.connections.close()
    assert book.num_open == 0


@async_test
async def test_a_channel_is_closed_when_nobody_used_it_for_long():
    book = Book(idle_s=30.0)
    await book.touch("a:1")
    book.now_s = 20.0
    await book.touch("b:1")
    book.now_s = 29.9
    book.connections.close_idle()
    assert book.connections.endpoints == ["a:1", "b:1"]
    book.now_s = 30.0
    book.connections.close_idle()
    assert book.connections.endpoints == ["b:1"]
    await eventually(lambda: book.num_open == 1, "it is closed")
    await eventually(lambda: not book.connections._closing, "it is forgotten")
    await book.connections.close()


@async_test
async def test_a_channel_in_use_is_never_closed_however_long_or_many():
    book = Book(idle_s=30.0, most_idle=2)
    async with book.connections.use("a:1") as used:
        await book.touch("b:1", "c:1", "d:1", "e:1")
        book.now_s = 1e6
        book.connections.close_idle()
        await eventually(lambda: book.num_open == 1, "the idle ones are closed")
        assert not used.is_closed
        async with book.connections.use("a:1"):
            pass
        book.connections.close_idle()
        assert book.connections.endpoints == ["a:1"]
    await book.connections.close()


@async_test
async def test_of_many_idle_channels_those_used_last_stay():
    book = Book(most_idle=3)
    await book.touch(*(f"h:{i}" for i in range(300)), "h:297", "h:1")
    assert book.connections.endpoints == ["h:299", "h:297", "h:1"]
    await eventually(lambda: book.num_open == 3, "the others are closed")
    await book.connections.close()


@pytest.mark.parametrize("state", [grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN])
@async_test
async def test_a_broken_channel_is_closed_as_soon_as_nobody_uses_it(state):
    book = Book()
    async with book.connections.use("a:1"):
        async with book.connections.use("a:1") as channel:
            channel.state = state
        assert book.connections.endpoints == ["a:1"]
    assert book.connections.endpoints == []
    await eventually(lambda: channel.is_closed, "it is closed")


@async_test
async def test_a_disconnected_endpoint_gets_a_channel_of_its_own_next_time():
    book = Book()
    async with book.connections.use("a:1") as old:
        await book.connections.disconnect("a:1")
        assert old.is_closed
        async with book.connections.use("a:1") as new:
            assert new is not old
    assert book.connections.endpoints == ["a:1"]
    assert not new.is_closed
    await book.connections.disconnect("nobody:1")
    await book.connections.close()


@async_test
async def test_the_timer_is_set_for_when_the_longest_unused_one_is_due(monkeypatch):
    timers = []
    book = Book(idle_s=30.0)

    def call_later(delay_s, callback):
        timers.append((delay_s, callback))
        return SimpleNamespace(cancel=lambda: None)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "call_later", call_later)
        await book.touch("a:1")
        book.now_s = 20.0
        await book.touch("b:1")
        for book.now_s, left in ((30.0, ["b:1"]), (50.0, [])):
            timers[-1][1]()
            assert book.connections.endpoints == left
        book.now_s = 60.0
        await book.touch("c:1")
    assert [delay_s for delay_s, _ in timers] == [30.0, 20.0, 30.0]
    await book.connections.close()


@async_test
async def test_the_timer_closes_what_is_idle_and_ends():
    connections = Connections(idle_s=0.0)
    async with connections.use("127.0.0.1:9"):
        pass
    await eventually(lambda: not connections.endpoints, "the timer closes it")
    await connections.close()


@async_test
async def test_three_hundred_holders_that_are_gone_leave_no_channel():
    connections = Connections()

    async def ask(endpoint):
        async with connections.use(endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/headrace.v1.TransferService/RenewLease")(b"", timeout=WAIT_S)

    await asyncio.gather(*(ask(f"127.0.{i // 250}.{1 + i % 250}:9") for i in range(300)))
    assert len(connections.endpoints) <= 32
    await connections.close()
    assert connections.endpoints == []


@async_test
async def test_who_asks_while_it_is_being_opened_shares_it_and_an_endpoint_that_may_not_be_dialed_leaves_nothing():
    book = Book()
    asked, opened = [], asyncio.Event()

    async def connect(endpoint):
        asked.append(endpoint)
        if endpoint == "stranger:1":
            raise PermissionDeniedError("NOT_A_PEER", "no")
        await opened.wait()
        return await book._connect(endpoint)

    connections = Connections(connect=connect)

    async def use():
        async with connections.use("a:1") as channel:
            return channel

    users = [asyncio.ensure_future(use()) for _ in range(2)]
    await eventually(lambda: len(asked) == 2, "both wait for a channel")
    opened.set()
    first, second = await asyncio.gather(*users)
    assert first is second
    assert book.num_open == 1
    with pytest.raises(PermissionDeniedError, match="no"):
        async with connections.use("stranger:1"):
            pass
    assert connections.endpoints == ["a:1"]
    await connections.close()
