"""A session's stream: one message per step, coalesced while nobody reads, bounded."""

import pytest
from headrace_core.errors import HandoffLostError, OverloadedError, UnavailableError
from headrace_core.request import FinishReason, SampledToken, TokenLogprobs
from headrace_core.testing.async_test import async_test
from headrace_core.wire import decode_failure, decode_finish, decode_logprobs
from headrace_decode.session import Session


@async_test
async def test_what_one_step_made_is_one_message():
    session = Session("s")
    session.put_token(1, SampledToken(7), None)
    session.put_token(2, SampledToken(8, TokenLogprobs(-1.0, ((8, -1.0),))), FinishReason.STOP)
    session.flush(0.25)
    message = await session.next()
    assert message.step_us == 250_000
    assert [output.sequence_number for output in message.outputs] == [1, 2]
    assert [list(output.token_ids) for output in message.outputs] == [[7], [8]]
    assert not message.outputs[0].logprobs
    assert [decode_logprobs(entry) for entry in message.outputs[1].logprobs] == [TokenLogprobs(-1.0, ((8, -1.0),))]
    assert decode_finish(message.outputs[1].finish_reason) is FinishReason.STOP


@async_test
async def test_unread_steps_coalesce_in_order():
    session = Session("s")
    for token_id in (1, 2, 3):
        session.put_token(1, SampledToken(token_id), None)
        session.flush(0.1)
    session.put_failure(1, HandoffLostError("STALE_ATTEMPT", "replaced"))
    (output,) = (await session.next()).outputs
    assert list(output.token_ids) == [1, 2, 3]
    assert decode_failure(output.failure).reason == "STALE_ATTEMPT"


@async_test
async def test_too_much_unread_is_an_error():
    session = Session("s", max_unread_tokens=2)
    session.put_token(1, SampledToken(1), None)
    session.put_token(1, SampledToken(1), None)
    with pytest.raises(OverloadedError) as raised:
        session.put_token(1, SampledToken(1), None)
    assert raised.value.reason == "SLOW_READER"


@async_test
async def test_reading_makes_room():
    session = Session("s", max_unread_tokens=2)
    for _ in range(10):
        session.put_token(1, SampledToken(1), None)
        session.flush(0.0)
        await session.next()


@async_test
async def test_a_closed_session_says_why():
    session = Session("s")
    session.put_token(1, SampledToken(1), None)
    session.close(UnavailableError("DRAINING", "going"))
    session.close(UnavailableError("SESSION_CLOSED", "later"))
    with pytest.raises(UnavailableError) as raised:
        await session.next()
    assert raised.value.reason == "DRAINING"
