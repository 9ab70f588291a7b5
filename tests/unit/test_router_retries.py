"""Attempts that fail, over real gRPC with fake workers: made again or told to the client, and nothing is left."""

import asyncio

import grpc
import pytest
from headrace.v1 import types_pb2
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    InvalidRequestError,
    LayoutMismatchError,
    OverloadedError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_router.testing import (
    check_timings,
    remembered,
    remembering_worker,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)


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
        ("prefill", DeadlineError("DEADLINE_EXCEEDED", "the client has a minute, this worker's clock is wrong")),
        ("start", DeadlineError("DEADLINE_EXCEEDED", "late")),
        ("sequence", DeadlineError("DEADLINE_EXCEEDED", "late")),
        ("prefill", InvalidRequestError("BAD_REQUEST", "nonsense")),
        ("start", InvalidRequestError("PROMPT_TOO_LONG", "too long")),
        ("sequence", InvalidRequestError("BAD_SAMPLING", "no token left")),
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


def test_what_one_worker_calls_invalid_is_asked_of_another_and_is_final_when_that_says_so_too(tmp_path):
    async def test(router):
        prefills = router.workers[:2]
        for number in (1, 2):
            for worker in prefills:
                worker.faults.prefill.append(InvalidRequestError("PROMPT_TOO_LONG", f"too long {number}"))
        error = await router.refused(text_request("hi"))
        assert (type(error), error.reason) == (InvalidRequestError, "PROMPT_TOO_LONG")
        assert [len(worker.prefills) for worker in prefills] == [1, 1]

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("prefill"), scripted_worker("decode")], test)


def test_a_deadline_that_passed_for_the_client_too_is_final(tmp_path):
    async def test(router):
        router.workers[0].faults.prefill_gate.clear()
        with pytest.raises(DeadlineError):
            await router.generate(text_request("hi"), timeout_s=None)
        assert len(router.workers[0].prefills) == 1
        router.workers[0].faults.prefill_gate.set()

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, request_timeout_s=0.5)


@pytest.mark.parametrize("role", ["both", "decode"])
def test_a_request_that_ends_its_workers_is_given_two(tmp_path, role):
    """The others live, and serve everybody else."""

    async def test(router):
        decodes = [worker for worker in router.workers if worker.info.role != types_pb2.WORKER_ROLE_PREFILL]
        endings = []

        def deadly(worker):
            real = worker.run_sequence

            async def run_sequence(request):
                if request.num_prompt_tokens < 5:
                    return await real(request)
                endings.append(asyncio.create_task(worker.stop()))
                await asyncio.Event().wait()

            worker.run_sequence = run_sequence

        for worker in decodes:
            deadly(worker)
        error = await router.refused(text_request("deadly"))
        assert (type(error), error.reason) == (UnavailableError, "RETRIES_EXHAUSTED")
        assert "WORKER_LOST" in str(error)
        assert len(endings) == 2
        await asyncio.gather(*endings)
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 20}))
        assert sample.token_ids == remembered("hi", 20)

    workers = [remembering_worker(role) for _ in range(4)]
    run_router(tmp_path, workers if role == "both" else [remembering_worker("prefill"), *workers], test)


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


def test_grpc_cancellation_status_of_a_worker_is_a_lost_worker():
    from headrace_router.flow import _cause

    def error(code):
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="x")

    assert isinstance(_cause(error(grpc.StatusCode.CANCELLED)), UnavailableError)
    assert isinstance(_cause(error(grpc.StatusCode.INTERNAL)), UnavailableError)
    assert isinstance(_cause(error(grpc.StatusCode.DEADLINE_EXCEEDED)), DeadlineError)


@pytest.mark.parametrize(
    ("leg", "reason", "num_expected"),
    [
        ("prefill", "NO_FREE_PAGES", [512, 512]),
        ("sequence", "QUEUE_FULL", [512, 512]),
        ("sequence", "NO_FREE_PAGES", [512, 894]),
    ],
)
def test_only_what_ran_out_of_pages_reserves_those_of_all_that_it_may_produce(tmp_path, leg, reason, num_expected):
    """Any other orphan would claim a worker that is nearly empty, and hold up who comes with a few tokens."""

    async def test(router):
        prefill, decode = router.workers
        fault = OverloadedError(reason, "made to fail")
        getattr((prefill if leg == "prefill" else decode).faults, leg).append(
            (5, fault) if leg == "sequence" else fault
        )
        expected = []
        dispatcher = router.service._router._flow._dispatcher
        place = dispatcher.place

        async def watch(sample):
            waiting = sample.waiting()
            expected.append(waiting.num_expected_tokens - waiting.num_tokens)
            return await place(sample)

        dispatcher.place = watch
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 900}))
        assert len(sample.token_ids) == 900
        assert expected == num_expected

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)
