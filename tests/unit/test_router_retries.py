"""Attempts that fail, over real gRPC with fake workers: made again or told to the client, and nothing is left."""

import asyncio
from types import SimpleNamespace

import pytest
from headrace_core.errors import (
    DeadlineError,
    HandoffLostError,
    InvalidRequestError,
    LayoutMismatchError,
    OverloadedError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_core.transfer.hold import Side, TakeError
from headrace_router.requests import flow
from headrace_router.testing import (
    check_timings,
    remembered,
    remembering_worker,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)


def _cause(error):
    return error.error if isinstance(error, TakeError) else error


@pytest.mark.parametrize(
    ("leg", "error"),
    [
        ("prefill", UnavailableError("DRAINING", "draining")),
        ("prefill", OverloadedError("NO_FREE_PAGES", "full")),
        ("prefill", HandoffLostError("STALE_ATTEMPT", "stale")),
        ("join", TakeError(Side.HOLDER, HandoffLostError("LEASE_ENDED", "gone"))),
        ("join", TakeError(Side.CHANNEL, TransferCorruptError("CHECKSUM", "corrupt"))),
        ("join", TakeError(Side.CHANNEL, TransferCorruptError("TOKENS_MISMATCH", "others"))),
        ("join", TakeError(Side.CHANNEL, LayoutMismatchError("NO_COMMON_TRANSPORT", "none"))),
        ("join", OverloadedError("NO_FREE_PAGES", "full")),
        ("join", TakeError(Side.HOLDER, InvalidRequestError("BAD_HANDOFF", "unreadable"))),
        ("sequence", OverloadedError("NO_FREE_PAGES", "out of pages")),
        ("prefill", DeadlineError("DEADLINE_EXCEEDED", "the client has a minute, this worker's clock is wrong")),
        ("join", DeadlineError("DEADLINE_EXCEEDED", "late")),
        ("sequence", DeadlineError("DEADLINE_EXCEEDED", "late")),
        ("prefill", InvalidRequestError("BAD_REQUEST", "nonsense")),
        ("join", InvalidRequestError("PROMPT_TOO_LONG", "too long")),
        ("sequence", InvalidRequestError("BAD_SAMPLING", "no token left")),
    ],
    ids=lambda value: value if isinstance(value, str) else _cause(value).reason,
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
        assert router.metric("headrace_retries_total", reason=_cause(error).reason) == 1

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


@pytest.mark.parametrize("side", Side)
def test_rule_7_only_the_one_whose_failure_it_was_is_blamed(tmp_path, side):
    async def test(router):
        prefill, decode = router.workers
        decode.faults.join.append(TakeError(side, UnavailableError("DRAINING", "made to fail")))
        running, seen = router.service._router._flow, []
        react = running._react

        def spy(sample, placement, ended, error, endings):
            react(sample, placement, ended, error, endings)
            held = {worker.address for worker in (placement.prefill, placement.decode) if not worker.takes_work}
            seen.append((set(sample.avoid), held))
            assert sample.prefer == (prefill.address if side is Side.TAKER else "")

        running._react = spy
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 9}))
        assert sample.token_ids == remembered("hi", 9)
        blamed = {
            Side.TAKER: {decode.address},
            Side.HOLDER: {prefill.address},
            Side.CHANNEL: {prefill.address, decode.address},
        }[side]
        assert seen == [(blamed, blamed)]

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


OTHER_TOKENS = {
    "tokens": lambda prefilled: setattr(prefilled, "tokens_sha256", bytes(32)),
    "tokens unsaid": lambda prefilled: prefilled.ClearField("tokens_sha256"),
}


@pytest.mark.parametrize("tamper", OTHER_TOKENS.values(), ids=OTHER_TOKENS)
@pytest.mark.parametrize("max_tokens", [1, 30], ids=["ends at once", "goes on"])
def test_a_first_token_of_other_tokens_never_reaches_the_client(tmp_path, tamper, max_tokens):
    """The answer carries another token, which must not be seen."""

    def answer(prefilled):
        prefilled.token_id ^= 1
        tamper(prefilled)

    async def test(router):
        router.workers[1].faults.prefilled.append(answer)
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": max_tokens}))
        assert sample.token_ids == remembered("hi", max_tokens)
        assert router.metric("headrace_retries_total", reason="TOKENS_MISMATCH") == 1
        assert [call.attempt for call in router.workers[0].prefills] == [1, 2]

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


def test_workers_that_always_answer_for_something_else_are_given_up_on(tmp_path):
    async def test(router):
        for _ in range(3):
            router.workers[1].faults.prefilled.append(OTHER_TOKENS["tokens"])
        error = await router.refused(text_request("hi"))
        assert error.reason == "RETRIES_EXHAUSTED"
        assert "TOKENS_MISMATCH" in str(error)

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test, max_attempts=3)


def test_rule_11_a_worker_is_told_how_little_it_had_better_compute_itself(tmp_path):
    async def test(router):
        await router.generate(text_request("hi", sampling={"max_tokens": 2}))
        (start,) = router.workers[1].starts
        assert (start.local_below, start.prefill_address) == (48, router.workers[0].address)

    workers = [remembering_worker("prefill"), remembering_worker("decode")]
    run_router(tmp_path, workers, test, local_below_tokens=48)


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


@pytest.mark.parametrize(("role", "reason"), [("both", "WORKER_LOST"), ("decode", "WORKER_LOST"), ("prefill", "LOST")])
def test_a_request_that_ends_its_workers_is_given_two(tmp_path, role, reason):
    """The others live, and serve everybody else. Of a holder's end the decode worker may hear first, or the router."""

    async def test(router):
        endings = []

        def deadly(worker):
            start, hold = worker.start_sequence, worker.hold

            def start_sequence(router_id, message):
                if message.num_prompt_tokens < 5:
                    start(router_id, message)
                else:
                    endings.append(asyncio.create_task(worker.stop()))

            def hold_sequence(order, outbox):
                if order.spec.num_prompt_tokens >= 5:
                    worker.faults.prefill_gate.clear()
                    endings.append(asyncio.create_task(worker.stop()))
                return hold(order, outbox)

            if role == "prefill":
                worker.hold = hold_sequence
            else:
                worker.start_sequence = start_sequence

        for worker in workers:
            deadly(worker)
        error = await router.refused(text_request("deadly"))
        assert (type(error), error.reason) == (UnavailableError, "RETRIES_EXHAUSTED")
        assert reason in str(error)
        assert len(endings) == 2
        await asyncio.gather(*endings)
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 20}))
        assert sample.token_ids == remembered("hi", 20)

    workers = [remembering_worker(role) for _ in range(4)]
    others = {"both": [], "decode": ["prefill"], "prefill": ["decode"]}[role]
    run_router(tmp_path, [*(remembering_worker(other) for other in others), *workers], test)


def test_a_worker_that_is_lost_twice_is_one_lost_worker(tmp_path):
    """A decode worker hears of its holder's end before the router does, which may give it the second attempt, too."""

    async def test(router):
        doomed, other, decode = router.workers
        await other.set_ready(False)
        fleet = router.service._router.fleet
        await wait_until(lambda: len(fleet.workers()) == 2)
        decode.faults.join.append(TakeError(Side.CHANNEL, HandoffLostError("HOLDER_LOST", "made to fail")))
        endings, hold = [], doomed.hold

        async def end():
            await doomed.stop()
            await other.set_ready(True)

        def hold_sequence(order, outbox):
            if doomed.prefills:
                doomed.faults.prefill_gate.clear()
                endings.append(asyncio.create_task(end()))
            return hold(order, outbox)

        doomed.hold = hold_sequence
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 20}))
        assert sample.token_ids == remembered("hi", 20)
        assert router.metric("headrace_retries_total", reason="HOLDER_LOST") >= 1
        await asyncio.gather(*endings)
        assert len(endings) == 1

    run_router(tmp_path, [remembering_worker(role) for role in ("prefill", "prefill", "decode")], test)


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


def test_samples_without_a_token_come_again_at_different_times_and_those_with_one_at_once():
    def failed(num_failed, *output_ids):
        return SimpleNamespace(attempt=num_failed + 1, num_moves=1, output_ids=list(output_ids))

    pauses = {num_failed: [flow._pause_s(failed(num_failed)) for _ in range(200)] for num_failed in (1, 2, 3, 9)}
    for num_failed, most_s in ((1, 0.02), (2, 0.04), (3, 0.08), (9, 0.5)):
        assert 0.8 * most_s < max(pauses[num_failed]) <= most_s
        assert len(set(pauses[num_failed])) > 100
    assert flow._pause_s(failed(3, 7)) == 0.0
