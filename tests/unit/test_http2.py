"""HTTP/2 as the router speaks it to workers: messages, windows, and what an end that misbehaves may cost."""

import asyncio
import struct

import pytest
from headrace.v1 import decode_service_pb2 as pb
from headrace_core.errors import ProtocolError, UnavailableError
from headrace_core.http2 import frames
from headrace_core.http2.call import Call, open_call
from headrace_core.http2.frames import frame
from headrace_core.http2.hpack import encode
from headrace_core.http2.messages import Messages, prefixed
from headrace_core.identity import CallTls, Identity, Role
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.testing import wait_until

SESSION = "/headrace.v1.DecodeService/Session"
HEAD = encode([(b":status", b"200"), (b"content-type", b"application/grpc")])


def setting(name, value):
    return frame(frames.SETTINGS, 0, 0, struct.pack(">HI", name, value))


def window(number, more):
    return frame(frames.WINDOW_UPDATE, 0, number, struct.pack(">I", more))


class Transport:
    """A socket's other side: what was written, as frames."""

    def __init__(self):
        self.parts = []
        self.closed = self.aborted = False
        self.unread = 0

    def write(self, data):
        self.parts.append(data)

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True

    def is_closing(self):
        return self.closed

    def get_extra_info(self, name):
        return None

    def get_write_buffer_size(self):
        return self.unread

    def frames(self):
        data, found = b"".join(self.parts).removeprefix(frames.PREFACE), []
        while data:
            high, low, kind, flags, number = frames.HEAD.unpack_from(data)
            size = high << 8 | low
            found.append((kind, flags, number, data[9 : 9 + size]))
            data = data[9 + size :]
        return found

    def sent(self, kind):
        return [payload for each, _, _, payload in self.frames() if each == kind]


def a_call(taken=None):
    """Return a call whose head has been answered, and its transport."""
    taken = [] if taken is None else taken
    call, transport = Call("/S/M", "x:1", "http", taken.append), Transport()
    call.connection_made(transport)
    call.data_received(frame(frames.SETTINGS, 0, 0) + frame(frames.HEADERS, frames.END_HEADERS, 1, HEAD))
    return call, transport


def test_messages_are_cut_wherever_their_bytes_are():
    sent = [b"", b"a", b"b" * 70_000, b"c" * 5, b""]
    data = b"".join(map(prefixed, sent))
    for step in (1, 4, 5, 6, 7, 16_384, len(data)):
        messages = Messages(1 << 20)
        found = [each for at in range(0, len(data), step) for each in messages.feed(data[at : at + step])]
        assert found == sent
        assert messages.is_between


def test_messages_that_are_too_large_or_compressed_are_refused():
    with pytest.raises(ValueError, match="at most 10"):
        Messages(10).feed(prefixed(b"x" * 11))
    with pytest.raises(ValueError, match="compressed"):
        Messages(10).feed(b"\x01\0\0\0\x01x")


@async_test
async def test_a_message_leaves_as_the_windows_let_it():
    call, transport = a_call()
    message = bytes(range(256)) * 400
    call.say(message)
    call.say(b"behind")
    sent = b"".join(transport.sent(frames.DATA))
    assert len(sent) == frames.DEFAULT_WINDOW_BYTES, "the connection's window"
    call.data_received(window(0, 1 << 20))
    assert len(b"".join(transport.sent(frames.DATA))) == frames.DEFAULT_WINDOW_BYTES, "the stream's own is used up, too"
    call.data_received(window(1, 1))
    assert len(b"".join(transport.sent(frames.DATA))) == frames.DEFAULT_WINDOW_BYTES + 1
    call.data_received(setting(frames.INITIAL_WINDOW_SIZE, 1 << 20))
    assert b"".join(transport.sent(frames.DATA)) == prefixed(message) + prefixed(b"behind")
    assert max(map(len, transport.sent(frames.DATA))) == frames.FRAME_BYTES
    call.close()


@async_test
async def test_a_window_that_shrinks_below_nothing_holds_back_until_it_has_grown():
    call, transport = a_call()
    call.say(bytes(1000))
    call.data_received(setting(frames.INITIAL_WINDOW_SIZE, 0))
    call.say(b"later")
    assert len(transport.sent(frames.DATA)) == 1
    call.data_received(window(1, 1005))
    assert len(transport.sent(frames.DATA)) == 1, "what was sent before counts"
    call.data_received(window(1, 10))
    assert transport.sent(frames.DATA)[1] == prefixed(b"later")
    call.close()


@async_test
async def test_what_comes_is_given_back_to_the_windows_before_they_are_used_up():
    taken = []
    call, transport = a_call(taken)
    data = prefixed(b"x" * (frames.FRAME_BYTES - 5))
    for _ in range(1000):
        call.data_received(frame(frames.DATA, 0, 1, data))
    assert len(taken) == 1000
    assert not transport.closed
    for number in (0, 1):
        given = [struct.unpack(">I", payload)[0] for kind, _, at, payload in transport.frames()
                 if kind == frames.WINDOW_UPDATE and at == number]  # fmt: skip
        at_first = (1 << 20) - (frames.DEFAULT_WINDOW_BYTES if number == 0 else 0)
        assert 0 <= 1000 * len(data) - (sum(given) - (0 if number else at_first)) <= 1 << 20
        assert len(given) < 40, "told in large parts"
    call.close()


@async_test
async def test_bytes_may_come_one_by_one_padded_and_between_other_frames():
    taken = []
    call, transport = a_call(taken)
    padded = b"\x03" + prefixed(b"padded") + bytes(3)
    data = (
        frame(frames.PING, 0, 0, b"01234567")
        + frame(frames.DATA, frames.PADDED, 1, padded)
        + frame(frames.PRIORITY, 0, 1, bytes(5))
        + frame(0xEE, 0xFF, 1, b"not known")
        + frame(frames.DATA, 0, 1, prefixed(b"plain"))
    )
    for at in range(len(data)):
        call.data_received(data[at : at + 1])
    assert taken == [b"padded", b"plain"]
    assert (frames.PING, frames.ACK, 0, b"01234567") in transport.frames()
    call.close()


@async_test
async def test_trailers_say_how_a_call_ended():
    for fields, expected in (
        ([(b"grpc-status", b"0")], None),
        ([(b"grpc-status", b"14"), (b"headrace-reason", b"DRAINING"), (b"grpc-message", b"it%20goes")], "DRAINING"),
        ([(b"grpc-status", b"8")], "RESOURCE_EXHAUSTED"),
        ([(b"grpc-status", b"nonsense")], "UNKNOWN"),
        ([], "UNKNOWN"),
    ):
        call, transport = a_call()
        call.data_received(frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, encode(fields)))
        error = await call.ended
        assert (error and error.reason) == expected
        assert transport.closed
        if expected == "DRAINING":
            assert isinstance(error, UnavailableError)
            assert str(error) == "it goes"


@async_test
async def test_answers_that_are_not_grpcs_are_told_by_their_status():
    call, transport = Call("/S/M", "x:1", "http", [].append), Transport()
    call.connection_made(transport)
    block = encode([(b":status", b"503"), (b"content-type", b"text/html")])
    call.data_received(frame(frames.SETTINGS, 0, 0) + frame(frames.HEADERS, frames.END_HEADERS, 1, block))
    error = await call.ended
    assert isinstance(error, UnavailableError)
    assert "status 503" in str(error)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(frames.RST_STREAM, 0, 1, struct.pack(">I", frames.REFUSED_STREAM)), "UNAVAILABLE"),
        (frame(frames.RST_STREAM, 0, 1, struct.pack(">I", frames.ENHANCE_YOUR_CALM)), "RESOURCE_EXHAUSTED"),
        (frame(frames.RST_STREAM, 0, 1, struct.pack(">I", frames.INTERNAL_ERROR)), "INTERNAL"),
        (frame(frames.GOAWAY, 0, 0, struct.pack(">II", 0, 0)), "UNAVAILABLE"),
        (frame(frames.DATA, frames.END_STREAM, 1), "UNAVAILABLE"),
        (frame(frames.DATA, 0, 3, b"x"), "PROTOCOL"),
        (frame(frames.HEADERS, frames.END_HEADERS, 2, HEAD), "PROTOCOL"),
        (frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff"), "PROTOCOL"),
        (frame(frames.HEADERS, 0, 1, HEAD) + frame(frames.PING, 0, 0, bytes(8)), "PROTOCOL"),
        (frame(frames.HEADERS, 0, 1, b"") + frame(frames.CONTINUATION, 0, 1, bytes(16_000)) * 2, "PROTOCOL"),
        (frame(frames.CONTINUATION, frames.END_HEADERS, 1, HEAD), "PROTOCOL"),
        (frame(frames.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4)), "PROTOCOL"),
        (frame(frames.DATA, frames.PADDED, 1, b"\x05abc"), "PROTOCOL"),
        (frame(frames.DATA, 0, 1, b"\0\xff\xff\xff\xff"), "PROTOCOL"),
        (frame(frames.DATA, 0, 1, bytes(16_385)), "PROTOCOL"),
        (frame(frames.PING, 0, 0, b"short"), "PROTOCOL"),
        (frame(frames.SETTINGS, 0, 0, b"short"), "PROTOCOL"),
        (setting(frames.INITIAL_WINDOW_SIZE, 1 << 31), "PROTOCOL"),
        (window(1, 0), "PROTOCOL"),
        (window(0, frames.MOST_WINDOW_BYTES), "PROTOCOL"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "PROTOCOL"),
        (frame(frames.PING, 0, 0, bytes(8)) * 60_000, "PROTOCOL"),
        (frame(frames.DATA, 0, 1) * 60_000, "PROTOCOL"),
    ],
)
@async_test
async def test_whatever_ends_a_call_ends_it_by_name(data, reason):
    call, transport = a_call()
    now_s = call._pace._seen_s
    call._pace._clock = lambda: now_s  # a flood is one, however slowly this machine takes it
    call.data_received(data)
    assert call.ended.done()
    error = call.ended.result()
    assert error.reason == reason
    assert isinstance(error, ProtocolError) == (reason == "PROTOCOL")
    call.say(b"nobody hears this")
    call.close()
    assert transport.closed
    assert not call.streams


@async_test
async def test_answers_that_the_other_end_does_not_read_do_not_pile_up():
    call, transport = a_call()
    transport.unread = (64 << 20) + 1
    call.data_received(frame(frames.PING, 0, 0, bytes(8)))
    assert transport.closed


@async_test
async def test_a_ping_is_answered_while_prompts_wait_to_leave():
    call, transport = a_call()
    transport.unread = 32 << 20
    call.data_received(frame(frames.PING, 0, 0, b"01234567"))
    assert (frames.PING, frames.ACK, 0, b"01234567") in transport.frames()
    assert not transport.closed
    call.close()


@pytest.mark.parametrize("is_window_open", [True, False])
@async_test
async def test_what_an_end_that_reads_nothing_costs_is_bounded(is_window_open):
    """Whether it lets us send and reads none of it, or lets us send nothing; its call ends, by name, and is dropped."""
    call, transport = a_call()
    num_said = 0
    while not call.ended.done():
        if is_window_open:
            transport.unread += 1 << 20
            call.data_received(window(0, 1 << 20) + window(1, 1 << 20))
        call.say(bytes((1 << 20) - 5))
        num_said += 1
        assert num_said < 100
    assert 60 < num_said < 70
    assert call.ended.result().reason == "PROTOCOL"
    assert "not read" in str(call.ended.result())
    assert transport.closed
    assert transport.aborted == is_window_open
    assert not call.streams


@async_test
async def test_settings_that_make_a_window_too_large_end_a_call():
    call, transport = a_call()
    call.data_received(window(1, frames.MOST_WINDOW_BYTES - frames.DEFAULT_WINDOW_BYTES))
    assert not transport.closed
    call.data_received(setting(frames.INITIAL_WINDOW_SIZE, frames.DEFAULT_WINDOW_BYTES + 1))
    assert call.ended.result().reason == "PROTOCOL"


@async_test
async def test_a_stream_may_go_on_after_a_goaway_that_names_it():
    taken = []
    call, _ = a_call(taken)
    call.data_received(frame(frames.GOAWAY, 0, 0, struct.pack(">II", 1, 0)))
    call.data_received(frame(frames.DATA, 0, 1, prefixed(b"still")))
    assert taken == [b"still"]
    call.connection_lost(None)
    assert call.ended.result().reason == "UNAVAILABLE"


@async_test
async def test_what_a_taker_raises_is_how_the_call_ended():
    def refuse(message):
        raise ProtocolError("PROTOCOL", "no")

    call, transport = Call("/S/M", "x:1", "http", refuse), Transport()
    call.connection_made(transport)
    call.data_received(frame(frames.HEADERS, frames.END_HEADERS, 1, HEAD) + frame(frames.DATA, 0, 1, prefixed(b"x")))
    assert str(call.ended.result()) == "no"


@async_test
async def test_a_prompt_larger_than_every_window_arrives_at_grpcs_server():
    taken = []
    worker = FakeWorker("decode", max_context_tokens=1 << 21)
    address = await worker.start()
    call = await open_call(address, SESSION, taken.append)
    try:
        async with asyncio.timeout(WAIT_S):
            call.say(pb.SessionRequest(open=pb.OpenSession(router_id=7)).SerializeToString())
            start = pb.StartSequence(sequence_number=1, attempt=1, token_ids=[1 << 20] * 1_000_000, timeout_ms=1000)
            call.say(pb.SessionRequest(start=start).SerializeToString())
            await wait_until(lambda: worker.starts)
        assert len(worker.starts[0].token_ids) == 1_000_000
        assert taken[0] == b""
    finally:
        call.close()
        await worker.stop()


@async_test
async def test_nobody_at_an_address_is_unavailable():
    with pytest.raises(UnavailableError, match="failed to connect"):
        await open_call("127.0.0.1:9", SESSION, [].append)


@async_test
async def test_a_call_shows_its_certificate_and_wants_the_servers(identities, tmp_path):
    from tests.unit.test_authority import serving

    async with serving(Role.DECODE, identities, tmp_path) as address, asyncio.timeout(WAIT_S):
        router = Identity(identities / "router", Role.ROUTER).call_worker()
        call = await open_call(address, "/grpc.health.v1.Health/Watch", [].append, tls=router)
        call.say(b"")
        assert not call.ended.done()
        call.close()
        client = Identity(identities / "client", Role.CLIENT).call_worker()
        call = await open_call(address, SESSION, [].append, tls=client)
        assert (await call.ended).reason == "WRONG_ROLE"
        with pytest.raises(UnavailableError, match="Hostname mismatch"):
            await open_call(address, SESSION, [].append, tls=CallTls(router.context, "router.headrace.internal"))
        plain = await open_call(address, SESSION, [].append)
        assert isinstance(await plain.ended, UnavailableError)
