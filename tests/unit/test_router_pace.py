"""What a worker sends without pause costs it its link, and the router next to nothing."""

import asyncio

import pytest
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import worker_service_pb2
from headrace_core.errors import ProtocolError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.pace import Pace
from headrace_router.fleet.session import StepSession
from headrace_router.testing import remembered, remembering_worker, run_router, text_request


def test_a_burst_passes_and_a_pace_and_nothing_above_both():
    now = [0.0]
    pace = Pace("reports", per_s=10.0, burst=20.0, clock=lambda: now[0])
    for _ in range(20):
        pace.take()
    for _ in range(1000):
        now[0] += 0.125
        pace.take()
    now[0] += 1e6  # what was not used is not saved up
    for _ in range(20):
        pace.take()
    with pytest.raises(ProtocolError, match="it sends more than 10 reports a second, and 20 at once"):
        pace.take()


class Sink:
    take_plainly = None

    def on_entry(self, entry, event, now_s):
        return entry.position > 0

    def on_ended(self, ended):
        raise AssertionError("nothing ends it")


def steps(*numbers, position=5):
    tokens = pb.Tokens(token_ids=[1])
    entries = [pb.StepEntry(sequence_number=number, attempt=1, position=position, tokens=tokens) for number in numbers]
    return pb.SessionResponse(entries=entries)


def a_session():
    """Return one with a listener, of sequence 1, in which no time passes."""
    info = worker_service_pb2.GetInfoResponse(vocab_size=10)
    session = StepSession(7, info, KvLayout(1, 16, CacheDtype.BFLOAT16, LatentAttention(16, 8)))
    session._idle._clock = lambda: session._idle._seen_s
    session.start(Sink(), pb.StartSequence(sequence_number=1, attempt=1))
    return session


def test_what_a_listener_gets_has_no_pace_and_what_nobody_gets_has():
    session = a_session()
    for _ in range(20_000):
        session._fan_out(steps(1))
    for _ in range(100):  # of 1,000 sequences that ended together, beside one that goes on
        session._fan_out(steps(1, *range(1000, 2000)))
    for message in (steps(), steps(999), steps(1, position=0)):
        session = a_session()
        with pytest.raises(ProtocolError, match="for nobody"):  # noqa: PT012
            for _ in range(3000):
                session._fan_out(message)
    session = a_session()
    with pytest.raises(ProtocolError, match="for nobody"):  # noqa: PT012
        for _ in range(3000):
            session._fan_out(steps(1, *range(1000, 1200)))


@pytest.mark.parametrize("stream", ["WatchLoad", "Session"])
def test_a_worker_that_sends_without_pause_is_refused(tmp_path, stream):
    async def test(router):
        bad = remembering_worker("decode", num_pages=8)  # too few for the request: it goes elsewhere
        num_sent = [0]

        async def loads(request, context):
            while True:
                num_sent[0] += 1
                load = bad.load()
                load.num_free_pages -= num_sent[0] % 2
                yield load
                await asyncio.sleep(0)

        async def outputs(request, context):
            while True:
                num_sent[0] += 1
                yield steps(999)
                await asyncio.sleep(0)

        setattr(bad._servicer, stream, loads if stream == "WatchLoad" else outputs)
        await router.add(bad)
        await router.wait_states(["ready", "ready", "refused"])
        (status,) = [each for each in (await router.info()).workers if each.address == bad.address]
        assert "a second, and" in status.detail
        (sample,) = await router.generate(text_request("a" * 200, sampling={"max_tokens": 100}))
        assert sample.token_ids == remembered("a" * 200, 100)

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)
