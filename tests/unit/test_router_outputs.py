"""Outputs of workers that the router can not use: nothing of them reaches the client, and what they are of is freed."""

import asyncio

import grpc
import pytest
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.errors import (
    HandoffLostError,
)
from headrace_core.rpc import raised_from
from headrace_core.testing.async_test import WAIT_S
from headrace_router.testing import (
    byte_ids,
    remembered,
    remembering_worker,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)
from headrace_router.text.detokenizer import Detokenizer

LENGTH = types_pb2.FINISH_REASON_LENGTH
LOGPROB = types_pb2.TokenLogprobs(logprob=-0.5)


def entry(start, position, **event):
    """Return an entry of the sequence that was started so; `position` counts from its first token."""
    return pb.StepEntry(
        sequence_number=start.sequence_number,
        attempt=start.attempt,
        position=len(start.token_ids) + position,
        **event,
    )


def emit(decode, *entries):
    (router_id,) = decode._sessions
    decode.emit(router_id, entries)


def _unknown_finish(decode, start):
    emit(decode, entry(start, 1, tokens=pb.Tokens(token_ids=[65], finish_reason=99)))


def _logprobs_of_nothing(decode, start):
    emit(decode, entry(start, 1, tokens=pb.Tokens(token_ids=[65])))


def _ahead(decode, start):
    emit(decode, entry(start, 2, tokens=pb.Tokens(token_ids=[65], logprobs=[LOGPROB])))


def _joins_again(decode, start):
    emit(decode, entry(start, 1, joined=pb.Joined()))


def _nothing(decode, start):
    emit(decode, entry(start, 1))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_unknown_finish, "PROTOCOL"),
        (_logprobs_of_nothing, "PROTOCOL"),
        (_ahead, "PROTOCOL"),
        (_joins_again, "PROTOCOL"),
        (_nothing, "PROTOCOL"),
        (None, "BUG"),
    ],
)
def test_a_sequence_whose_output_the_router_can_not_use_is_cancelled(tmp_path, monkeypatch, spoil, reason):
    """The worker knows nothing of it, and would generate to the end of `max_tokens`."""

    async def test(router):
        _, decode = router.workers
        request = text_request("hi", sampling={"max_tokens": 1000, "top_logprobs": 0})
        running = asyncio.create_task(router.refused(request))
        await wait_until(lambda: len(decode.sequences) == 1)
        if spoil is not None:
            spoil(decode, decode.starts[0])
        else:
            monkeypatch.setattr(Detokenizer, "push", _raise)
            decode.step()
        assert reason in told(await running)
        await router.wait_empty()
        (cancel,) = decode.cancels
        assert cancel.sequence_number == decode.starts[0].sequence_number

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test, max_attempts=1)


@pytest.mark.parametrize("event", ["tokens", "prefilled"])
def test_rule_6_an_entry_that_is_behind_is_dropped_and_what_follows_is_taken(tmp_path, event):
    async def test(router):
        _, decode = router.workers
        running = asyncio.create_task(router.generate(text_request("hi", sampling={"max_tokens": 8})))
        await wait_until(lambda: len(decode.sequences) == 1)
        start = decode.starts[0]
        decode.step()
        behind = {"tokens": pb.Tokens(token_ids=[1, 2]), "prefilled": pb.Prefilled(token_id=1)}[event]
        emit(decode, entry(start, 1 if event == "tokens" else 0, **{event: behind}))
        while decode.sequences:
            decode.step()
        assert (await running)[0].token_ids == remembered("hi", 8)
        assert router.metric("headrace_retries_total", reason="PROTOCOL") == 0

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode", step_s=None)], test)


def told(error):
    """Return the reason and the words of an error; the last attempt's reason is among them if there were no more."""
    return f"{error.reason}: {error}"


def _raise(*_):
    raise ZeroDivisionError("made to fail")


def test_nothing_follows_an_output_that_the_router_can_not_use(tmp_path):
    """What came after it would reach the client with a gap."""

    async def test(router):
        _, decode = router.workers
        running = asyncio.create_task(_received(router, text_request("hi", sampling={"max_tokens": 1000})))
        await wait_until(lambda: len(decode.sequences) == 1)
        decode.step()
        start = decode.starts[0]
        for position, (finish, token_id) in enumerate(((99, 66), (0, 67), (0, 68)), 2):
            emit(decode, entry(start, position, tokens=pb.Tokens(token_ids=[token_id], finish_reason=finish)))
        token_ids, error = await running
        assert "PROTOCOL" in told(error)
        assert token_ids == byte_ids("He")[: len(token_ids)]

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test, max_attempts=1)


async def _received(router, request):
    """Return the token ids that came before the error, and the error."""
    token_ids = []
    try:
        async for response in router.stub.Generate(request, timeout=WAIT_S):
            token_ids.extend(response.token_ids)
    except grpc.aio.AioRpcError as error:
        return token_ids, raised_from(error)
    raise AssertionError("the request was expected to fail")


@pytest.mark.parametrize("spoil", ["finish", "tokens", "detokenizer"])
def test_pages_of_a_first_token_that_the_router_can_not_use_are_released(tmp_path, monkeypatch, spoil):
    async def test(router):
        _, decode = router.workers
        changes = {
            "finish": lambda prefilled: setattr(prefilled, "finish_reason", 99),
            "tokens": lambda prefilled: prefilled.ClearField("tokens_sha256"),
        }
        decode.faults.join_gate.clear()
        if spoil == "detokenizer":
            monkeypatch.setattr(Detokenizer, "push", _raise)
        else:
            decode.faults.prefilled.append(changes[spoil])
        error = await router.refused(text_request("hi"))
        assert {"detokenizer": "BUG", "finish": "PROTOCOL", "tokens": "TOKENS_MISMATCH"}[spoil] in told(error)
        await router.wait_empty()

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, max_attempts=1)


def test_late_outputs_of_an_old_attempt_are_dropped(tmp_path):
    async def test(router):
        _, decode = router.workers
        decode.faults.ignores_cancel = True
        decode.faults.sequence.append((5, HandoffLostError("STALE_PAGE", "made to fail")))
        running = asyncio.create_task(router.generate(text_request("hi", sampling={"max_tokens": 40})))
        await wait_until(lambda: len(decode.starts) == 2)
        old, new = decode.starts
        assert (old.sequence_number, old.attempt, new.attempt) == (new.sequence_number, 1, 2)
        late = {"failure": pb.Failure(code=10, reason="STALE_PAGE", side=pb.FAILURE_SIDE_DECODE)}
        emit(decode, entry(old, 1, **late), entry(old, 900, tokens=pb.Tokens(token_ids=[1])))
        emit(decode, pb.StepEntry(sequence_number=999, attempt=1, **late))
        (sample,) = await running
        assert sample.token_ids == remembered("hi", 40)
        assert len(decode.starts) == 2, "nothing of the old attempt ended the new one"

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode", step_s=0.005)], test)


def test_what_a_reader_left_lying_comes_in_messages_of_bounded_size(tmp_path):
    """In one, 20 log-probabilities of each of 40,000 tokens would be more than grpc sends."""

    async def test(router):
        _, decode = router.workers
        sampling = {"max_tokens": 20_001, "ignore_eos": True, "top_logprobs": 20}
        call = router.stub.Generate(text_request("hi", sampling=sampling), timeout=WAIT_S)
        await wait_until(lambda: bool(decode.sequences))
        start, tops = decode.starts[0], [types_pb2.TopLogprob(token_id=i, logprob=-i) for i in range(20)]
        for number in range(40):
            tokens = pb.Tokens(
                token_ids=[65] * 500,
                logprobs=[types_pb2.TokenLogprobs(logprob=-1.0, top=tops)] * 500,
                finish_reason=LENGTH if number == 39 else 0,
            )
            emit(decode, entry(start, 1 + 500 * number, tokens=tokens))
        messages = [message async for message in call]
        assert [id for message in messages for id in message.token_ids][1:] == [65] * 20_000
        assert sum(len(message.logprobs) for message in messages) == 20_001
        assert max(message.ByteSize() for message in messages) < 2**20
        assert [message.finish_reason for message in messages if message.finish_reason] == [LENGTH]
        (router_id,) = decode._sessions
        decode._end((router_id, start.sequence_number))

    workers = [
        scripted_worker("prefill", max_context_tokens=30_000, num_pages=2000),
        scripted_worker("decode", step_s=None, max_context_tokens=30_000, num_pages=2000),
    ]
    run_router(tmp_path, workers, test)


def test_a_client_that_never_reads_its_log_probabilities_is_told_to_read_faster(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace_router.requests.running._MOST_UNREAD_LOGPROBS", 100)

    async def test(router):
        _, decode = router.workers
        request = text_request("hi", sampling={"max_tokens": 1000, "ignore_eos": True, "top_logprobs": 1})
        running = asyncio.create_task(_received(router, request))
        await wait_until(lambda: bool(decode.sequences))
        tokens = pb.Tokens(token_ids=[65] * 200, logprobs=[types_pb2.TokenLogprobs(logprob=-1.0)] * 200)
        emit(decode, entry(decode.starts[0], 1, tokens=tokens))
        assert (await running)[1].reason == "SLOW_READER"

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test)
