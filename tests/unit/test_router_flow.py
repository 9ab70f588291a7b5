"""The life of a request over real gRPC, with fake workers: what the client gets, and that nothing is left behind."""

import asyncio

import grpc
import pytest
from headrace.v1 import decode_service_pb2, types_pb2
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    InvalidRequestError,
    LayoutMismatchError,
    OverloadedError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_core.rpc import raised_from
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.detokenizer import Detokenizer
from headrace_router.testing import (
    BOS,
    EOS,
    HELLO,
    VOCAB_SIZE,
    byte_ids,
    remembered,
    remembering_worker,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH


def check_timings(message):
    timings = message.timings
    assert sum(phase.duration_us for phase in timings.phases) == timings.total_us
    before = sum(phase.duration_us for phase in timings.phases if phase.is_before_first_token)
    assert before == timings.ttft_us > 0
    return [phase.name for phase in timings.phases]


def test_a_request_is_prefilled_handed_off_and_streamed(tmp_path):
    async def test(router):
        (sample,) = await router.generate(
            text_request("hi", request_id="r-1", include_timings=True, sampling={"max_tokens": 40})
        )
        assert sample.text == (HELLO * 3)[: len(sample.text)]
        assert sample.token_ids == (byte_ids(HELLO) * 3)[:40]
        assert sample.last.finish_reason == LENGTH
        assert (sample.last.usage.num_prompt_tokens, sample.last.usage.num_output_tokens) == (3, 40)
        names = check_timings(sample.last)
        assert names == [
            "tokenize", "queue", "prefill_queue", "prefill", "prefill_rpc",
            "decode_queue", "transfer", "start_rpc", "first_step", "decode",
        ]  # fmt: skip
        timings = sample.last.timings
        assert (timings.num_attempts, timings.num_transfer_pages, timings.transport) == (1, 1, "fake")
        assert timings.prefill_worker == router.workers[0].address
        assert timings.decode_worker == router.workers[1].address
        (start,) = router.workers[1].starts
        assert list(start.token_ids) == [BOS, *byte_ids("hi")]
        assert router.metric("headrace_requests_total", outcome="ok") == 1
        assert router.metric("headrace_output_tokens_total") == 40
        assert router.metric("headrace_itl_seconds_count") == 39
        assert router.metric("headrace_ttft_seconds_count") == 1
        assert router.metric("headrace_workers", role="prefill", state="ready") == 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_a_worker_of_both_roles_serves_alone(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 8}))
        assert sample.text == "Hello, w"
        assert check_timings(sample.last) == [
            "tokenize", "queue", "decode_queue", "transfer", "start_rpc", "first_step", "decode",
        ]  # fmt: skip
        assert sample.last.timings.prefill_worker == ""

    run_router(tmp_path, [scripted_worker("both")], test)


def test_the_first_token_may_end_the_sample(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 1}))
        assert (sample.text, sample.token_ids) == ("H", byte_ids("H"))
        assert check_timings(sample.last)[-1] == "prefill_rpc"
        assert router.workers[1].starts == []

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_samples_are_streamed_side_by_side(tmp_path):
    async def test(router):
        samples = await router.generate(text_request("hi", n=4, sampling={"max_tokens": 20}))
        assert [sample.text for sample in samples] == [sample.text for sample in samples[:1]] * 4
        assert sorted(call.sample_index for call in router.workers[0].prefills) == [0, 1, 2, 3]
        assert len({call.sampling.seed for call in router.workers[0].prefills}) == 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_end_of_sequence_has_no_text(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi"))
        assert (sample.text, sample.last.finish_reason) == ("ab", STOP)
        assert sample.token_ids == [*byte_ids("ab"), EOS]
        (sample,) = await router.generate(text_request("hi", sampling={"stop_token_ids": [ord("b")]}))
        assert (sample.text, sample.token_ids) == ("a", byte_ids("ab"))

    tokens = scripted([*byte_ids("ab"), EOS])
    workers = [
        FakeWorker(role, next_token=tokens, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])
        for role in ("prefill", "decode")
    ]
    run_router(tmp_path, workers, test)


def test_a_stop_string_is_found_across_tokens_and_ends_the_sequence(tmp_path):
    async def test(router):
        request = text_request("hi", include_timings=True, sampling={"stop_strings": ["wör", "!!"]})
        (sample,) = await router.generate(request)
        assert sample.text == "Hello, "
        assert sample.token_ids == byte_ids("Hello, wör")
        assert (sample.last.finish_reason, sample.last.matched_stop_string) == (STOP, "wör")
        assert sample.last.usage.num_output_tokens == len(byte_ids("Hello, wör"))
        check_timings(sample.last)
        await wait_until(lambda: len(router.workers[1].cancels) == 1)

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_a_stop_string_in_the_first_token_needs_no_decode_worker(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", sampling={"stop_strings": ["H"]}))
        assert (sample.text, sample.last.matched_stop_string) == ("", "H")
        assert router.workers[1].starts == []

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_several_tokens_in_a_step_stop_at_the_stop_string(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", sampling={"stop_strings": ["lo"]}))
        assert (sample.text, sample.token_ids) == ("Hel", byte_ids("Hello"))

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", tokens_per_step=7)], test)


def test_log_probabilities_come_with_their_tokens(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 9, "top_logprobs": 1}))
        assert [entry.top[0].token_id for entry in sample.logprobs] == sample.token_ids

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", tokens_per_step=2)], test)


PHASES = ("queued", "prefilling", "prefilled", "starting", "decoding")


async def _reach(router, phase):
    """Hold requests in `phase`, and return how to see that one is there."""
    prefill, decode = router.workers
    if phase == "queued":
        prefill.drain()
        await router.wait_states(["draining", "ready"])
        return lambda: router.service._router.num_queued == 1
    if phase == "prefilling":
        prefill.faults.prefill_gate.clear()
        return lambda: bool(prefill.prefills)
    if phase == "prefilled":
        prefill.faults.answer_gate.clear()
        return lambda: bool(prefill.leases)
    if phase == "starting":
        decode.faults.start_gate.clear()
        return lambda: bool(decode.starts)
    return lambda: bool(decode.sequences)


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_everything(tmp_path, phase):
    async def test(router):
        is_there = await _reach(router, phase)
        call = router.stub.Generate(text_request("hi", n=1))
        reading = asyncio.create_task(call.read())
        await wait_until(is_there)
        call.cancel()
        await asyncio.wait([reading])
        await router.wait_empty()
        await wait_until(lambda: router.metric("headrace_requests_total", outcome="cancelled") == 1)

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test)


@pytest.mark.parametrize("phase", PHASES)
def test_a_deadline_of_the_router_frees_everything(tmp_path, phase):
    async def test(router):
        await _reach(router, phase)
        with pytest.raises(DeadlineError):
            await router.generate(text_request("hi"), timeout_s=None)
        await router.wait_empty()
        await wait_until(lambda: router.metric("headrace_requests_total", outcome="deadline") == 1)

    run_router(
        tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test, request_timeout_s=0.3
    )


@pytest.mark.parametrize("phase", PHASES)
def test_a_deadline_of_the_client_frees_everything(tmp_path, phase):
    async def test(router):
        is_there = await _reach(router, phase)
        was_there, timeout_s = False, 0.3
        while not was_there:  # a call may need longer than its limit to get there
            call = asyncio.create_task(router.generate(text_request("hi"), timeout_s=timeout_s))
            while not call.done():
                was_there = was_there or is_there()
                await asyncio.sleep(0.002)
            assert isinstance(call.exception(), DeadlineError)
            await router.wait_empty()
            timeout_s *= 2
        # Which of the two it is to the router: whether its own clock or the client's word came first.
        outcomes = [router.metric("headrace_requests_total", outcome=name) for name in ("deadline", "cancelled")]
        assert sum(outcomes) >= 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test)


@pytest.mark.parametrize(
    ("leg", "error"),
    [
        ("prefill", UnavailableError("DRAINING", "draining")),
        ("prefill", OverloadedError("NO_FREE_PAGES", "full")),
        ("prefill", HandoffLostError("STALE_ATTEMPT", "stale")),
        ("start", HandoffLostError("LEASE_EXPIRED", "gone")),
        ("start", TransferCorruptError("CHECKSUM", "corrupt")),
        ("start", TransferCorruptError("TOKENS_MISMATCH", "others")),
        ("start", LayoutMismatchError("NO_COMMON_TRANSPORT", "none")),
        ("start", OverloadedError("NO_FREE_PAGES", "full")),
        ("start", InvalidRequestError("BAD_HANDOFF", "unreadable")),
        ("sequence", OverloadedError("NO_FREE_PAGES", "out of pages")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.reason,
)
def test_a_failed_attempt_is_made_again_and_the_client_sees_nothing_of_it(tmp_path, leg, error):
    async def test(router):
        prefill, decode = router.workers
        if leg == "sequence":
            decode.faults.sequence.append((5, error))
        else:
            faulty = prefill if leg == "prefill" else decode
            getattr(faulty.faults, leg).append(error)
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 30}))
        assert sample.token_ids == remembered("hi", 30)
        assert "retry" in check_timings(sample.last)
        assert sample.last.timings.num_attempts == 2
        assert [call.attempt for call in prefill.prefills] == [1, 2]
        assert router.metric("headrace_retries_total", reason=error.reason) == 1

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


ANSWERS_FOR_ANOTHER = {
    "request": (lambda h: setattr(h, "request_id", "another"), "BAD_HANDOFF"),
    "attempt": (lambda h: setattr(h, "attempt", 7), "BAD_HANDOFF"),
    "sample": (lambda h: setattr(h.sampling_state, "sample_index", 1), "BAD_HANDOFF"),
    "seed": (lambda h: setattr(h.sampling_state, "seed", h.sampling_state.seed ^ 1), "BAD_HANDOFF"),
    "count": (lambda h: setattr(h, "num_tokens", 2), "BAD_HANDOFF"),
    "tokens": (lambda h: setattr(h, "tokens_sha256", bytes(32)), "TOKENS_MISMATCH"),
    "tokens unsaid": (lambda h: h.ClearField("tokens_sha256"), "TOKENS_MISMATCH"),
}


@pytest.mark.parametrize(("tamper", "reason"), ANSWERS_FOR_ANOTHER.values(), ids=ANSWERS_FOR_ANOTHER)
@pytest.mark.parametrize("max_tokens", [1, 30], ids=["ends at once", "goes on"])
def test_a_prefill_that_answers_for_something_else_gives_the_client_no_token(tmp_path, tamper, reason, max_tokens):
    """The answer carries another token, which must not be seen."""

    def answer(handoff):
        handoff.first_token_id ^= 1
        tamper(handoff)

    async def test(router):
        router.workers[0].faults.tickets.append(answer)
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": max_tokens}))
        assert sample.token_ids == remembered("hi", max_tokens)
        assert router.metric("headrace_retries_total", reason=reason) == 1
        assert [call.attempt for call in router.workers[0].prefills] == [1, 2]

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


def test_a_prefill_worker_that_always_answers_for_something_else_is_given_up_on(tmp_path):
    async def test(router):
        for _ in range(3):
            router.workers[0].faults.tickets.append(lambda h: setattr(h, "tokens_sha256", bytes(32)))
        error = await router.refused(text_request("hi"))
        assert error.reason == "RETRIES_EXHAUSTED"
        assert "TOKENS_MISMATCH" in str(error)
        assert not router.workers[1].starts

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test, max_attempts=3)


def test_a_failed_sample_of_a_colocated_worker_goes_on_with_its_tokens(tmp_path):
    async def test(router):
        router.workers[0].faults.sequence.append((7, OverloadedError("NO_FREE_PAGES", "out of pages")))
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 20}))
        assert sample.token_ids == remembered("hi", 20)
        check_timings(sample.last)

    run_router(tmp_path, [remembering_worker("both")], test)


def test_an_error_of_the_request_is_not_retried(tmp_path):
    async def test(router):
        router.workers[0].faults.prefill.append(InvalidRequestError("PROMPT_TOO_LONG", "too long"))
        error = await router.refused(text_request("hi"))
        assert (type(error), error.reason) == (InvalidRequestError, "PROMPT_TOO_LONG")
        assert len(router.workers[0].prefills) == 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def _unknown_finish(decode, start):
    output = decode_service_pb2.SequenceOutput(sequence_number=start.sequence_number, token_ids=[65], finish_reason=99)
    decode.emit(start.session_id, [output])


def _logprobs_of_nothing(decode, start):
    output = decode_service_pb2.SequenceOutput(sequence_number=start.sequence_number, token_ids=[65])
    decode.emit(start.session_id, [output])


@pytest.mark.parametrize("has_started", [True, False], ids=["decoding", "starting"])
@pytest.mark.parametrize(
    ("spoil", "reason"), [(_unknown_finish, "PROTOCOL"), (_logprobs_of_nothing, "PROTOCOL"), (None, "BUG")]
)
def test_a_sequence_whose_output_the_router_can_not_use_is_cancelled(tmp_path, monkeypatch, spoil, reason, has_started):
    """The worker knows nothing of it, and would generate to the end of `max_tokens`."""

    async def test(router):
        _, decode = router.workers
        if not has_started:
            real = decode.run_sequence

            async def slow(request):
                response = await real(request)
                spoilt(decode, request)
                (running,) = router.service._router._running.values()
                await wait_until(running.samples[0].attempt_over.done)
                return response

            decode.run_sequence = slow
        request = text_request("hi", sampling={"max_tokens": 1000, "top_logprobs": 0})
        running = asyncio.create_task(router.refused(request))
        await wait_until(lambda: len(decode.sequences) == 1)
        if has_started:
            spoilt(decode, decode.starts[0])
        assert reason in told(await running)
        await router.wait_empty()
        (cancel,) = decode.cancels
        assert cancel.sequence_number == decode.starts[0].sequence_number

    def spoilt(decode, start):
        if spoil is not None:
            return spoil(decode, start)
        monkeypatch.setattr(Detokenizer, "push", _raise)
        return decode.step()

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=None)], test, max_attempts=1)


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
        for finish, token_id in ((99, 66), (0, 67), (0, 68)):
            output = decode_service_pb2.SequenceOutput(
                sequence_number=start.sequence_number, token_ids=[token_id], finish_reason=finish
            )
            decode.emit(start.session_id, [output])
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


@pytest.mark.parametrize("spoil", ["finish", "handoff", "detokenizer"])
def test_pages_of_a_first_token_that_the_router_can_not_use_are_released(tmp_path, monkeypatch, spoil):
    async def test(router):
        prefill, decode = router.workers
        real = prefill.prefill

        async def spoilt(request):
            response = await real(request)
            if spoil == "finish":
                response.finish_reason = 99
            elif spoil == "handoff":
                prefill.release(response.handoff.lease.lease_id)
                response.ClearField("handoff")
            return response

        prefill.prefill = spoilt
        if spoil == "detokenizer":
            monkeypatch.setattr(Detokenizer, "push", _raise)
        error = await router.refused(text_request("hi"))
        assert ("BUG" if spoil == "detokenizer" else "PROTOCOL") in told(error)
        assert decode.starts == []

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, max_attempts=1)


def test_attempts_are_bounded_and_the_last_cause_is_told(tmp_path):
    async def test(router):
        for _ in range(3):
            router.workers[1].faults.start.append(TransferCorruptError("CHECKSUM", "layer 1 differs"))
        error = await router.refused(text_request("hi"))
        assert error.reason == "RETRIES_EXHAUSTED"
        assert "CHECKSUM: layer 1 differs" in str(error)
        assert len(router.workers[0].prefills) == 3

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, max_attempts=3)


def test_one_failed_sample_fails_the_request_with_one_error(tmp_path):
    async def test(router):
        router.workers[1].faults.start.append(UnavailableError("DRAINING", "draining"))
        error = await router.refused(text_request("hi", n=3))
        assert error.reason == "RETRIES_EXHAUSTED"

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode", step_s=0.01)], test, max_attempts=1)


def test_a_prefill_worker_that_dies_is_replaced(tmp_path):
    async def test(router):
        first, second, _ = router.workers
        first.faults.prefill_gate.clear()
        second.faults.prefill_gate.clear()
        running = asyncio.create_task(router.generate(text_request("hi", sampling={"max_tokens": 20})))
        await wait_until(lambda: bool(first.prefills or second.prefills))
        victim, other = (first, second) if first.prefills else (second, first)
        other.faults.prefill_gate.set()
        await victim.stop()
        (sample,) = await running
        assert sample.token_ids == remembered("hi", 20)
        router.workers.remove(victim)

    run_router(
        tmp_path, [remembering_worker("prefill"), remembering_worker("prefill"), remembering_worker("decode")], test
    )


def test_a_stream_survives_the_death_of_its_decode_worker(tmp_path):
    async def test(router):
        _, first, second = router.workers
        request = text_request("hi", n=3, include_timings=True, sampling={"max_tokens": 60})
        running = asyncio.create_task(router.generate(request))
        await wait_until(lambda: any(len(s.tokens) > 20 for w in (first, second) for s in w.sequences.values()))
        victim = first if first.sequences else second
        await victim.stop()
        samples = await running
        assert [sample.token_ids for sample in samples] == [remembered("hi", 60)] * 3
        assert max(sample.last.timings.num_attempts for sample in samples) == 2
        for sample in samples:
            check_timings(sample.last)
        router.workers.remove(victim)

    workers = [
        remembering_worker("prefill"),
        remembering_worker("decode", step_s=0.005),
        remembering_worker("decode", step_s=0.005),
    ]
    run_router(tmp_path, workers, test)


def test_a_restarted_worker_at_the_same_address_is_a_new_one(tmp_path):
    async def test(router):
        # Its own loopback address: nobody else is given the port while neither worker has it.
        decode = await router.add(remembering_worker("decode", step_s=0.005), listen="127.0.0.2:0")
        running = asyncio.create_task(router.generate(text_request("hi", sampling={"max_tokens": 60})))
        await wait_until(lambda: any(len(s.tokens) > 20 for s in decode.sequences.values()))
        await decode.stop()
        router.workers.remove(decode)
        await router.add(remembering_worker("decode"), listen=decode.address)
        (sample,) = await running
        assert sample.token_ids == remembered("hi", 60)

    run_router(tmp_path, [remembering_worker("prefill")], test)


def test_late_outputs_of_an_old_attempt_are_dropped(tmp_path):
    async def test(router):
        _, decode = router.workers
        decode.faults.ignores_cancel = True
        decode.faults.sequence.append((5, HandoffLostError("STALE_PAGE", "made to fail")))
        running = asyncio.create_task(router.generate(text_request("hi", sampling={"max_tokens": 40})))
        await wait_until(lambda: len(decode.starts) == 2)
        old = decode.starts[0]
        for number in (old.sequence_number, 999):
            output = decode_service_pb2.SequenceOutput(sequence_number=number, token_ids=[1, 2, 3])
            decode.emit(old.session_id, [output])
        (sample,) = await running
        assert sample.token_ids == remembered("hi", 40)

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode", step_s=0.005)], test)


def test_a_last_output_that_overtakes_the_answer_to_start_is_not_lost(tmp_path):
    async def test(router):
        _, decode = router.workers
        real = decode.run_sequence

        async def slow(request):
            response = await real(request)
            while decode.sequences:
                decode.step()
            (running,) = router.service._router._running.values()
            await wait_until(lambda: running.samples[0].has_ended)
            return response

        decode.run_sequence = slow
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 6}))
        assert sample.token_ids == remembered("hi", 6)
        check_timings(sample.last)
        assert sample.last.timings.num_transfer_pages == 1

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode", step_s=None)], test)


def test_many_requests_share_few_pages_and_all_finish(tmp_path):
    async def test(router):
        prompts = [f"prompt {i} " * (1 + i % 5) for i in range(24)]
        requests = [text_request(prompt, sampling={"max_tokens": 20}) for prompt in prompts]
        results = await asyncio.gather(*(router.generate(request) for request in requests))
        assert [result[0].token_ids for result in results] == [remembered(prompt, 20) for prompt in prompts]
        assert router.metric("headrace_requests_total", outcome="ok") == 24

    workers = [
        remembering_worker("prefill", num_pages=12),
        remembering_worker("decode", num_pages=16, max_step_sequences=4),
    ]
    run_router(tmp_path, workers, test)


def test_grpc_cancellation_status_of_a_worker_is_a_lost_worker():
    from headrace_router.flow import _cause

    def error(code):
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="x")

    assert isinstance(_cause(error(grpc.StatusCode.CANCELLED)), UnavailableError)
    assert isinstance(_cause(error(grpc.StatusCode.INTERNAL)), UnavailableError)
    assert isinstance(_cause(error(grpc.StatusCode.DEADLINE_EXCEEDED)), DeadlineError)
