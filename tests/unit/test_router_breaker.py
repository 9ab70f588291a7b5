"""Circuits: who fails in a row gets nothing for a while, then one sequence at a time; its partner is not blamed."""

import asyncio
from dataclasses import dataclass, field

import pytest
from headrace_core.errors import InvalidRequestError, OverloadedError, UnavailableError
from headrace_core.testing.fake_worker import TakeError
from headrace_core.transfer.hold import Side
from headrace_router.placement.breaker import (
    FIRST_PAUSE_S,
    MOST_FAILURES,
    MOST_PAUSE_S,
    Breaker,
    Circuit,
    admitted,
)
from headrace_router.testing import remembered, remembering_worker, run_router, text_request, wait_until


def a_breaker():
    return Breaker(draw=lambda low, high: (low + high) / 2)


def failing(breaker, now_s=0.0, count=MOST_FAILURES):
    return [breaker.on_failure("ENGINE_FAILED", now_s) for _ in range(count)]


def test_it_opens_after_so_many_failures_in_a_row():
    breaker = a_breaker()
    assert failing(breaker, count=MOST_FAILURES - 1) == [False] * (MOST_FAILURES - 1)
    breaker.on_success(0.0)
    assert failing(breaker, count=MOST_FAILURES - 1) == [False] * (MOST_FAILURES - 1)
    assert breaker.admits(0.0)
    assert breaker.on_failure("ENGINE_FAILED", 0.0)
    assert breaker.circuit(0.0) is Circuit.OPEN
    assert not breaker.admits(0.0)
    assert breaker.left_s(0.25) == pytest.approx(FIRST_PAUSE_S - 0.25)


def test_what_began_before_it_opened_counts_for_nothing():
    breaker = a_breaker()
    failing(breaker)
    assert failing(breaker, 0.5) == [False] * MOST_FAILURES
    breaker.on_success(0.5)
    assert breaker.circuit(0.5) is Circuit.OPEN
    assert breaker.circuit(FIRST_PAUSE_S) is Circuit.HALF_OPEN


def test_half_open_it_gets_one_sequence_at_a_time_until_one_succeeds():
    breaker, probe = a_breaker(), object()
    failing(breaker)
    now_s = FIRST_PAUSE_S
    assert breaker.admits(now_s)
    breaker.on_start(probe, now_s)
    breaker.on_start(object(), now_s)
    assert not breaker.admits(now_s)
    breaker.on_over(object())
    assert not breaker.admits(now_s), "another sequence is over"
    breaker.on_over(probe)
    assert breaker.admits(now_s), "its client left: another probe may begin"
    breaker.on_start(probe, now_s)
    breaker.on_success(now_s)
    assert breaker.circuit(now_s) is Circuit.CLOSED


def test_each_probe_that_fails_doubles_the_pause_up_to_a_bound_and_success_makes_it_short_again():
    breaker, now_s, pauses = a_breaker(), 0.0, []
    failing(breaker)
    for _ in range(8):
        pauses.append(breaker.left_s(now_s))
        now_s += pauses[-1]
        assert breaker.on_failure("ENGINE_FAILED", now_s)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, MOST_PAUSE_S, MOST_PAUSE_S, MOST_PAUSE_S]
    now_s += MOST_PAUSE_S
    breaker.on_success(now_s)
    assert breaker.on_failure("ENGINE_FAILED", now_s), "one that goes wrong soon after opens it at once"
    now_s += MOST_PAUSE_S
    breaker.on_success(now_s)
    breaker.on_success(now_s)
    failing(breaker, now_s)
    assert breaker.left_s(now_s) == FIRST_PAUSE_S


def test_routers_do_not_probe_together():
    drawn = set()
    for _ in range(20):
        breaker = Breaker()
        failing(breaker)
        drawn.add(breaker.left_s(0.0))
    assert len(drawn) > 10
    assert all(0.8 * FIRST_PAUSE_S <= pause_s <= 1.2 * FIRST_PAUSE_S for pause_s in drawn)


@dataclass
class Stub:
    name: str
    can_prefill: bool
    can_decode: bool
    breaker: Breaker = field(default_factory=a_breaker)


def names(workers):
    return "".join(worker.name for worker in workers)


def test_an_open_one_is_left_out_unless_it_is_the_last_of_its_side():
    fleet = [Stub("p", True, False), Stub("q", True, False), Stub("d", False, True), Stub("e", False, True)]
    failing(fleet[0].breaker)
    failing(fleet[2].breaker)
    assert names(admitted(fleet, fleet, 0.0)) == "qe"
    assert names(admitted(fleet[:3], fleet, 0.0)) == "q", "the other one is only busy"
    failing(fleet[1].breaker)
    assert names(admitted(fleet, fleet, 0.0)) == "pqe"
    both = Stub("b", True, True)
    assert names(admitted([*fleet, both], [*fleet, both], 0.0)) == "eb"


def breakers(router):
    return {link.address: link.breaker for link in router.service._router.fleet.links}


@pytest.mark.parametrize("side", Side)
def test_the_worker_that_failed_is_blamed_and_never_its_partner(tmp_path, side):
    async def test(router):
        prefill, decode = router.workers
        for _ in range(3):
            decode.faults.join.append(TakeError(side, UnavailableError("PEER_LOST", "made to fail")))
        (sample,) = await router.generate(text_request("hi", sampling={"max_tokens": 3}))
        assert sample.token_ids == remembered("hi", 3)
        failed = {address for address, breaker in breakers(router).items() if breaker.last_reason}
        assert failed == {Side.TAKER: {decode.address}, Side.HOLDER: {prefill.address}, Side.CHANNEL: set()}[side]

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("NO_FREE_PAGES", "made to fail"),
        UnavailableError("DRAINING", "made to fail"),
        InvalidRequestError("BAD_HANDOFF", "made to fail"),
    ],
    ids=lambda error: error.reason,
)
def test_want_of_room_and_requests_that_can_not_be_are_no_failures(tmp_path, error):
    async def test(router):
        router.workers[1].faults.join += [error] * 3
        await router.generate(text_request("hi", sampling={"max_tokens": 3}))
        assert not any(breaker.last_reason for breaker in breakers(router).values())

    run_router(tmp_path, [remembering_worker("prefill"), remembering_worker("decode")], test)


def test_one_that_fails_everybody_gets_nothing_until_a_probe_succeeds(tmp_path):
    async def test(router):
        _, good, bad = router.workers
        bad.faults.join += [UnavailableError("PEER_LOST", "made to fail")] * MOST_FAILURES
        breaker, request = breakers(router)[bad.address], text_request("hi", sampling={"max_tokens": 3})
        breaker._draw = lambda low, high: 1e6  # it stays open until the test says otherwise
        while breaker.last_reason == "" or breaker._until_s is None:
            (sample,) = await router.generate(request)
            assert sample.token_ids == remembered("hi", 3), "another worker goes on with it"
        status = {worker.address: worker for worker in (await router.info()).workers}
        assert (status[bad.address].circuit, status[good.address].circuit) == ("open", "closed")
        assert "PEER_LOST" in status[bad.address].detail
        assert router.metric("headrace_circuits_opened_total", worker_role="decode") == 1
        assert router.metric("headrace_circuits", worker_role="decode", circuit="open") == 1
        num_before = len(bad.starts)
        for _ in range(6):
            await router.generate(request)
        assert len(bad.starts) == num_before
        breaker._until_s = 0.0
        assert (await router.info()).workers  # half-open from here on
        while len(bad.starts) == num_before:
            await router.generate(request)
        await wait_until(lambda: breaker._until_s is None)
        assert router.metric("headrace_circuits", worker_role="decode", circuit="closed") == 2

    workers = [remembering_worker("prefill"), remembering_worker("decode"), remembering_worker("decode")]
    run_router(tmp_path, workers, test)


def test_a_lost_worker_fails_once_however_many_sequences_it_had(tmp_path):
    async def test(router):
        _, first, second = router.workers
        for worker in (first, second):
            worker.faults.join_gate.clear()
        requests = [text_request(f"hi {number}", sampling={"max_tokens": 3}) for number in range(8)]
        calls = [asyncio.create_task(router.generate(request)) for request in requests]
        await wait_until(lambda: len(first.starts) + len(second.starts) == 8)
        lost = first if len(first.starts) > 1 else second
        await lost.stop()
        for worker in (first, second):
            worker.faults.join_gate.set()
        await asyncio.gather(*calls)
        assert breakers(router)[lost.address]._num_failures == 1
        router.workers.remove(lost)
        router.write_workers()

    workers = [remembering_worker("prefill"), remembering_worker("decode"), remembering_worker("decode")]
    run_router(tmp_path, workers, test)
