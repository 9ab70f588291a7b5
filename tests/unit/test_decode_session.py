"""Rule 13: a session's stream is one message per step, coalesced while nobody reads, and bounded in bytes."""

import asyncio

import pytest
from headrace.v1 import decode_service_pb2 as pb
from headrace_core.errors import HandoffLostError, HeadraceError, UnavailableError
from headrace_core.request import FinishReason, SampledToken, TokenLogprobs
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.wire import decode_failure, decode_finish, decode_logprobs, encode_failure
from headrace_decode.session import MOST_MESSAGE_BYTES, Session

MANY = TokenLogprobs(-1.0, tuple((token_id, -1.0) for token_id in range(20)))


class Under:
    """A session, and what its owner hears of it."""

    def __init__(self, **options) -> None:
        self.full: list[bool] = []
        self.slow: list[HeadraceError] = []
        self.session = Session(1, 2, on_full=self.full.append, on_slow=self.slow.append, **options)

    def put(self, position: int, token_id: int = 1, number: int = 1, **more) -> None:
        self.session.put_token(number, 1, position, SampledToken(token_id, **more))


@async_test
async def test_what_one_step_made_is_one_message():
    it = Under()
    it.put(5, 7)
    it.session.put_token(2, 3, 9, SampledToken(8, TokenLogprobs(-1.0, ((8, -1.0),))), FinishReason.STOP)
    it.session.flush(0.25)
    message = await it.session.next()
    assert message.step_us == 250_000
    assert [(each.sequence_number, each.attempt, each.position) for each in message.entries] == [(1, 1, 5), (2, 3, 9)]
    first, second = (entry.tokens for entry in message.entries)
    assert (list(first.token_ids), list(second.token_ids)) == ([7], [8])
    assert not first.logprobs
    assert [decode_logprobs(each) for each in second.logprobs] == [TokenLogprobs(-1.0, ((8, -1.0),))]
    assert decode_finish(second.finish_reason) is FinishReason.STOP


@async_test
async def test_unread_steps_coalesce_by_sequence_and_stay_in_order():
    it = Under()
    for step in range(3):
        for number in (1, 2):
            it.put(5 + step, 10 * number + step, number=number)
        it.session.flush(0.1)
    failure = encode_failure(HandoffLostError("STALE_ATTEMPT", "replaced"), pb.FAILURE_SIDE_DECODE)
    it.session.put(1, 1, 8, failure=failure)
    first, second, last = (await it.session.next()).entries
    assert (list(first.tokens.token_ids), first.position) == ([10, 11, 12], 5)
    assert (list(second.tokens.token_ids), second.position) == ([20, 21, 22], 5)
    assert (decode_failure(last.failure).reason, last.position) == ("STALE_ATTEMPT", 8)


@async_test
async def test_what_follows_another_event_is_an_entry_of_its_own():
    it = Under()
    it.put(5)
    it.session.put(1, 1, 6, joined=pb.Joined())
    it.put(6)
    assert [entry.WhichOneof("event") for entry in (await it.session.next()).entries] == ["tokens", "joined", "tokens"]


@async_test
async def test_without_news_there_is_a_beat():
    it = Under()
    assert await it.session.next() == pb.SessionResponse()
    it.put(5)
    assert await it.session.next() == pb.SessionResponse(), "a step's tokens leave together, when it is over"


@async_test
async def test_no_message_is_over_a_mebibyte_and_nothing_is_lost():
    it = Under(most_bytes=64 << 20)
    for position in range(9000):
        it.put(position, number=1 + position % 3, logprobs=MANY)
    it.session.flush(0.0)
    counts = {1: 0, 2: 0, 3: 0}
    num_messages = 0
    while sum(counts.values()) < 9000:
        message = await it.session.next()
        assert message.ByteSize() <= MOST_MESSAGE_BYTES
        num_messages += 1
        for entry in message.entries:
            counts[entry.sequence_number] += len(entry.tokens.token_ids)
            assert len(entry.tokens.token_ids) == len(entry.tokens.logprobs)
    assert counts == {1: 3000, 2: 3000, 3: 3000}
    assert num_messages > 1


@async_test
async def test_past_half_the_bound_it_is_full_until_enough_is_read():
    it = Under(most_bytes=1000)
    position = 0
    while not it.full:
        it.put(position)
        position += 1
    assert (it.full, it.slow) == ([True], [])
    it.session.flush(0.0)
    (entry,) = (await it.session.next()).entries
    assert len(entry.tokens.token_ids) == position
    assert it.full == [True, False]
    for _ in range(position):
        it.put(position)
    assert it.full == [True, False, True]


@async_test
async def test_more_than_the_bound_is_an_error_at_once():
    it = Under(most_bytes=1000)
    for position in range(200):
        it.put(position)
        if it.slow:
            break
    assert it.slow[0].reason == "SLOW_READER"
    assert position < 200


@async_test
async def test_a_full_session_that_nobody_reads_is_ended_and_one_that_is_read_is_not():
    left, kept = Under(most_bytes=1000, patience_s=0.2), Under(most_bytes=1000, patience_s=0.2)
    for it in (left, kept):
        for position in range(120):
            it.put(position)
    assert left.full == kept.full == [True]
    kept.session.flush(0.0)
    await kept.session.next()
    await eventually(lambda: bool(left.slow), "the session is slow")
    assert left.slow[0].reason == "SLOW_READER"
    assert kept.slow == []


@async_test
async def test_a_closed_session_says_why_and_takes_nothing_more():
    it = Under(most_bytes=1000)
    for position in range(120):
        it.put(position)
    it.session.close(UnavailableError("DRAINING", "going"))
    it.session.close(UnavailableError("SESSION_CLOSED", "later"))
    it.put(120)
    it.session.put(1, 1, 120, joined=pb.Joined())
    assert it.full == [True, False], "nothing pauses for it any more"
    for _ in range(2):
        with pytest.raises(UnavailableError) as raised:
            await asyncio.wait_for(it.session.next(), 10)
        assert raised.value.reason == "DRAINING"
