"""The life of a request over real gRPC, with fake workers: what the client gets, and that nothing is left behind."""

import asyncio

import pytest
from headrace.v1 import types_pb2
from headrace_core.errors import (
    DeadlineError,
)
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.testing import (
    BOS,
    EOS,
    HELLO,
    VOCAB_SIZE,
    byte_ids,
    check_timings,
    remembered,
    remembering_worker,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH


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
            "tokenize", "queue", "decode_queue", "prefill_queue", "prefill", "prefill_hop",
            "transfer", "join", "first_step", "decode",
        ]  # fmt: skip
        timings = sample.last.timings
        assert (timings.num_attempts, timings.num_transfer_pages, timings.transport) == (1, 1, "fake")
        assert timings.hidden_transfer_bytes == 512
        assert 0 < timings.hidden_transfer_us < timings.total_us, "no more than there was time for"
        assert timings.prefill_worker == router.workers[0].address
        assert timings.decode_worker == router.workers[1].address
        (start,) = router.workers[1].starts
        assert list(start.token_ids) == [BOS, *byte_ids("hi")]
        assert router.metric("headrace_requests_total", outcome="ok") == 1
        assert router.metric("headrace_output_tokens_total") == 40
        assert router.metric("headrace_itl_seconds_count") == 39
        assert router.metric("headrace_ttft_seconds_count") == 1
        sums = [router.metric("headrace_phase_seconds_sum", phase=name) for name in names]
        assert sum(sums) == pytest.approx(router.metric("headrace_e2e_seconds_sum"))
        assert router.metric("headrace_workers", worker_role="prefill", state="ready") == 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_a_worker_of_both_roles_serves_alone(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 8}))
        assert sample.text == "Hello, w"
        assert check_timings(sample.last) == [
            "tokenize", "queue", "decode_queue", "join", "first_step", "decode",
        ]  # fmt: skip
        assert sample.last.timings.prefill_worker == ""

    run_router(tmp_path, [scripted_worker("both")], test)


def test_the_first_token_may_end_the_sample(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", include_timings=True, sampling={"max_tokens": 1}))
        assert (sample.text, sample.token_ids) == ("H", byte_ids("H"))
        assert check_timings(sample.last)[-1] == "prefill_hop"
        assert router.workers[0].prefills[0].attempt == 1

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_samples_are_streamed_side_by_side(tmp_path):
    async def test(router):
        samples = await router.generate(text_request("hi", n=4, sampling={"max_tokens": 20}))
        assert [sample.text for sample in samples] == [sample.text for sample in samples[:1]] * 4
        assert sorted(call.sample_index for call in router.workers[0].prefills) == [0, 1, 2, 3]
        assert len({call.params.seed for call in router.workers[0].prefills}) == 1

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


def test_a_stop_string_in_the_first_token_ends_the_sequence(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("hi", sampling={"stop_strings": ["H"]}))
        assert (sample.text, sample.last.matched_stop_string) == ("", "H")
        await wait_until(lambda: len(router.workers[1].cancels) == 1)

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


PHASES = ("queued", "prefilling", "prefilled", "joining", "decoding")


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
        return lambda: bool(prefill.num_leases)
    if phase == "joining":
        decode.faults.join_gate.clear()
        return lambda: any(sample.output_ids for sample in _samples(router))
    return lambda: bool(decode.sequences)


def _samples(router):
    return [sample for running in router.service._router._running.values() for sample in running.samples]


def test_tokens_are_counted_as_they_come(tmp_path):
    """A stream may run for hours: what it had is seen meanwhile, and what it had before it was cancelled."""

    async def test(router):
        decode = router.workers[1]
        decode.faults.step_gate.clear()
        call = router.stub.Generate(text_request("hi", sampling={"max_tokens": 40}))
        await call.read()
        assert router.metric("headrace_ttft_seconds_count") == router.metric("headrace_output_tokens_total") == 1
        assert router.metric("headrace_itl_seconds_count") == 0
        decode.faults.step_gate.set()
        await call.read()
        call.cancel()
        await router.wait_empty()
        num_tokens = router.metric("headrace_output_tokens_total")
        assert num_tokens > 1
        assert router.metric("headrace_itl_seconds_count") == num_tokens - 1
        assert router.metric("headrace_e2e_seconds_count") == 0

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


@pytest.mark.parametrize(("limit_ms", "num_missed"), [(0, [0, 0]), (1e-6, [1, 7]), (1e6, [0, 0])])
def test_what_misses_an_objective_is_counted(tmp_path, limit_ms, num_missed):
    async def test(router):
        await router.generate(text_request("hi", sampling={"max_tokens": 8}))
        assert [router.metric("headrace_slo_missed_total", slo=slo) for slo in ("ttft", "itl")] == num_missed
        assert router.metric("headrace_slo_seconds", slo="itl") == limit_ms / 1000

    workers = [scripted_worker("prefill"), scripted_worker("decode")]
    run_router(tmp_path, workers, test, slo_ttft_ms=limit_ms, slo_itl_ms=limit_ms)


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
