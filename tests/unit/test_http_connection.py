"""A connection of HTTP: what it lets through, what it refuses, and what it may cost."""

import asyncio
import socket

import pytest
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_router.face.http import connection, exchange
from headrace_router.face.http.errors import HttpError, body_of
from headrace_router.face.http.server import HttpServer

from tests.unit.http_parts import Answer, Http, request


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch):
    monkeypatch.setattr(connection, "_LINGER_S", 0.1)


class Site:
    """A server whose answer is the request's body, or what `app` says."""

    def __init__(self, app=None):
        self.seen = []
        self.app = app

    async def __aenter__(self):
        self.server = HttpServer(self._answer, tls=None)
        self.address = await self.server.start("127.0.0.1:0")
        return self

    async def __aexit__(self, *_):
        await self.server.stop(0)
        await eventually(lambda: not len(self.server._connections), "every connection ended")

    async def _answer(self, each):
        self.seen.append(each.path)
        try:
            if self.app is not None:
                await self.app(each)
            else:
                each.answer(await each.read(), content_type="text/plain")
        except HttpError as error:
            each.answer(body_of(error), status=error.http_status)


async def tell(site, data):
    """Send bytes and return all that comes back until the server closes."""
    async with Http(site.address) as http:
        http.send(data)
        return (await http.closed()).decode()


@async_test
async def test_requests_on_one_connection_are_answered_in_order():
    async with Site() as site, Http(site.address) as http:
        for body in (b"one", b"two"):
            http.ask("POST", "/", body)
            assert (await http.answer()).body == body
        http.send(request("POST", "/a", b"three") + request("POST", "/b", b"four") + request("GET", "/c"))
        assert [(await http.answer()).body for _ in range(3)] == [b"three", b"four", b""]
        assert site.seen == ["/", "/", "/a", "/b", "/c"]


@async_test
async def test_a_request_may_come_byte_by_byte_and_in_chunks():
    chunked = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n3;x=y\r\ncde\r\n0\r\nt: v\r\n\r\n"
    async with Site() as site, Http(site.address) as http:
        for byte in chunked + request("POST", "/", b"next"):
            http.send(bytes([byte]))
            await asyncio.sleep(0)
        assert [(await http.answer()).body for _ in range(2)] == [b"abcde", b"next"]


@async_test
async def test_the_body_stays_outside_until_it_is_asked_for():
    asked = asyncio.Event()

    async def app(each):
        await asked.wait()
        each.answer(str(len(await each.read())))

    async with Site(app) as site, Http(site.address) as http:
        http.send(b"POST / HTTP/1.1\r\ncontent-length: 8000000\r\nexpect: 100-continue\r\n\r\n")
        await eventually(lambda: site.seen, "the request came in")
        http.send(bytes(8_000_000))
        await asyncio.sleep(0.05)
        (inside,) = site.server._connections._open
        assert inside._current._num_bytes < 1 << 20
        asked.set()
        assert (await http.head())[0] == 100
        assert (await http.answer()).body == b"8000000"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/3.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000, 431),
        (b"GET /" + b"y" * 20_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 9000000\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n-3\r\nabc\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabcd\r\n", 400),
    ],
)
@async_test
async def test_nonsense_is_refused_and_the_connection_ends(data, status):
    async with Site() as site:
        told = await tell(site, data)
        assert told.startswith(f"HTTP/1.1 {status} ")
        assert told.count("\r\n\r\n") == 1
        head, _, body = told.partition("\r\n\r\n")
        assert "connection: close" in head
        assert Answer(status, {}, body.encode()).error["code"] == "BAD_REQUEST"


@async_test
async def test_nonsense_after_a_request_does_not_spoil_its_answer():
    async with Site() as site:
        told = await tell(site, request("POST", "/", b"fine") + b"\0\0\0")
        assert [told.count("HTTP/1.1 200"), told.count("HTTP/1.1 400")] == [1, 1]
        assert "fine" in told


@async_test
async def test_chunks_that_grow_too_large_are_refused_and_not_kept():
    async with Site() as site, Http(site.address) as http:
        http.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        part = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        for _ in range(9):
            http.send(part)
        assert (await http.head())[0] == 413


@async_test
async def test_trailers_are_bounded(monkeypatch):
    monkeypatch.setattr(connection, "_MAX_RAW_BODY_BYTES", 1 << 16)
    async with Site() as site:
        data = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * (1 << 19)
        assert (await tell(site, data)).startswith("HTTP/1.1 400 ")


@async_test
async def test_requests_sent_ahead_are_bounded():
    going = asyncio.Event()

    async def app(each):
        await going.wait()
        each.answer("")

    async with Site(app) as site, Http(site.address) as http:
        http.send(request("GET", "/") * 100)
        await eventually(lambda: site.seen, "the first came in")
        (inside,) = site.server._connections._open
        await asyncio.sleep(0.01)
        assert len(inside._ahead) == connection._MAX_AHEAD
        going.set()
        told = (await http.closed()).decode()
        assert told.count("HTTP/1.1 200") == connection._MAX_AHEAD + 1
        assert told.count("HTTP/1.1 400") == 1


@async_test
async def test_a_head_that_does_not_come_ends_the_connection(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    async with Site() as site:
        assert (await tell(site, b"GET / HTTP/1.1\r\nx")).startswith("HTTP/1.1 408 ")
        assert await tell(site, b"") == ""


@async_test
async def test_an_idle_connection_ends(monkeypatch):
    monkeypatch.setattr(connection, "IDLE_TIMEOUT_S", 0.05)
    async with Site() as site:
        told = await tell(site, request("POST", "/", b"x"))
        assert told.startswith("HTTP/1.1 200 ")
        assert told.endswith("x")


@async_test
async def test_of_too_many_connections_the_one_longest_idle_ends():
    async with Site() as site:
        site.server._connections._most = 2
        async with Http(site.address) as first, Http(site.address) as second:
            for http in (first, second):
                http.ask("POST", "/", b"x")
                await http.answer()
            async with Http(site.address) as third:
                third.ask("POST", "/", b"y")
                assert (await third.answer()).body == b"y"
                assert await first.closed() == b""
                second.ask("POST", "/", b"z")
                assert (await second.answer()).body == b"z"


@async_test
async def test_connections_that_say_nothing_keep_nobody_out():
    async with Site() as site:
        site.server._connections._most = 2
        async with Http(site.address) as first, Http(site.address):
            await eventually(lambda: len(site.server._connections) == 2, "both are there")
            async with Http(site.address) as third:
                third.ask("POST", "/", b"x")
                assert (await third.answer()).body == b"x"
            assert await first.closed() == b""


@async_test
async def test_where_none_is_idle_the_next_connection_is_told_so():
    async def app(each):
        await asyncio.Event().wait()

    async with Site(app) as site:
        site.server._connections._most = 1
        async with Http(site.address) as first:
            first.ask("GET", "/")
            await eventually(lambda: site.seen, "the first came in")
            assert (await tell(site, request("GET", "/"))).startswith("HTTP/1.1 503 ")


@async_test
async def test_who_leaves_ends_the_answer_and_all_is_told():
    told = []

    async def app(each):
        each.add_done_callback(told.append)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async with Site(app) as site:
        async with Http(site.address) as http:
            http.ask("POST", "/", b"x")
            await eventually(lambda: site.seen, "the request came in")
        await eventually(lambda: len(told) == 2, "it was cancelled")
        assert told[0] == "cancelled"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@async_test
async def test_a_stream_is_chunked_or_ends_with_the_connection(version):
    async def app(each):
        each.begin_stream()
        each.send("one\n\n")
        each.end_stream("two\n\n")

    async with Site(app) as site:
        told = await tell(site, f"GET / HTTP/{version}\r\nconnection: close\r\n\r\n".encode())
        body = told.partition("\r\n\r\n")[2]
        assert body == {"1.0": "one\n\ntwo\n\n", "1.1": "5\r\none\n\n\r\n5\r\ntwo\n\n\r\n0\r\n\r\n"}[version]


@async_test
async def test_another_protocol_that_is_asked_for_is_not_spoken():
    async with Site() as site:
        told = await tell(site, b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n\r\n")
        assert told.startswith("HTTP/1.1 200 ")
        assert told.count("HTTP/1.1") == 1


@async_test
async def test_a_client_that_does_not_read_is_cut_off_when_it_reads_nothing_for_long(monkeypatch):
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.1)

    async def app(each):
        each.answer(bytes(64 << 20))

    async with Site(app) as site, Http(site.address) as http:
        http.writer.transport.pause_reading()
        http.ask("GET", "/")
        await eventually(lambda: site.seen and not len(site.server._connections), "it was cut off")


@async_test
async def test_small_writes_are_not_held_back():
    async with Site() as site, Http(site.address) as http:
        http.ask("POST", "/", b"x")
        await http.answer()
        (inside,) = site.server._connections._open
        raw = inside._transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@async_test
async def test_an_answer_that_went_wrong_ends_the_connection_and_is_logged(caplog):
    async def app(each):
        raise RuntimeError("oops")

    async with Site(app) as site:
        assert await tell(site, request("GET", "/")) == ""
    assert "unhandled error" in caplog.text


def test_limits_are_those_of_grpc():
    from headrace_core.grpc_options import MAX_MESSAGE_BYTES

    assert exchange.MAX_BODY_BYTES == MAX_MESSAGE_BYTES
    assert WAIT_S > connection.STALL_TIMEOUT_S
