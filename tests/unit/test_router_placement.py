"""A fleet whose two sides differ, over real gRPC: what can't be placed is refused at once, and nobody waits for it."""

import asyncio

import pytest
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.testing.fake_script import mixed
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.callers.caller import caller_of
from headrace_router.testing import (
    VOCAB_SIZE,
    remembered,
    run_router,
    text_request,
    wait_until,
)

PAGE = 16


def worker(role, **options):
    """A worker whose tokens depend on every token before; it makes 200 a second."""
    return FakeWorker(role, **{"next_token": mixed(256), "vocab_size": VOCAB_SIZE, "step_s": 0.005, **options})


def request(num_tokens, **sampling):
    """A prompt of so many tokens."""
    return text_request("x" * (num_tokens - 1), sampling={"max_tokens": 8, **sampling})


async def made(workers, num_tokens):
    """Wait until one of the workers has a sequence of more tokens, and return that worker."""
    await wait_until(lambda: any(len(s.tokens) > num_tokens for w in workers for s in w.sequences.values()))
    return next(w for w in workers if any(len(s.tokens) > num_tokens for s in w.sequences.values()))


FLEETS = {
    "prefill pool": ([("prefill", 4), ("decode", 64)], 65, "64"),
    "prefill pools": ([("prefill", 4), ("prefill", 6), ("decode", 64)], 97, "96"),
    "decode pool": ([("prefill", 64), ("decode", 4)], 64, "64"),
    "both": ([("both", 4), ("decode", 64)], 64, "64"),
}


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_a_prompt_that_no_worker_can_ever_hold_is_refused_at_once_and_holds_up_nobody(tmp_path, fleet):
    sizes, num_tokens, most = fleet

    async def test(router):
        large = [asyncio.create_task(router.refused(request(num_tokens))) for _ in range(3)]
        await asyncio.gather(*(router.generate(request(20)) for _ in range(3)))
        for error in await asyncio.gather(*large):
            assert (type(error), error.reason) == (OverloadedError, "NO_FREE_PAGES")
            assert f"holds {most};" in str(error)
        await router.generate(request(num_tokens - 1, max_tokens=1))

    run_router(tmp_path, [worker(role, num_pages=num_pages) for role, num_pages in sizes], test)


def test_what_can_never_start_is_refused_also_behind_one_that_waits(tmp_path):
    async def test(router):
        prefill, _ = router.workers
        prefill.faults.prefill_gate.clear()
        first = asyncio.create_task(router.generate(request(60)))
        await wait_until(lambda: len(prefill.prefills) == 1)
        head = asyncio.create_task(router.generate(request(60)))
        await wait_until(lambda: router.service._router.num_queued == 1)
        assert (await router.refused(request(65))).reason == "NO_FREE_PAGES"
        assert router.service._router.num_queued == 1
        prefill.faults.prefill_gate.set()
        await asyncio.gather(first, head)

    # A budget of 32 prompt tokens in flight: one prompt at a time.
    run_router(tmp_path, [worker("prefill", num_pages=4, max_step_tokens=16), worker("decode")], test)


def test_a_stream_that_outgrew_every_prefill_worker_survives_its_decode_worker(tmp_path):
    """The decode worker that is left computes it, prompt and tokens so far, and others go on beside it."""

    async def test(router):
        _, *decodes = router.workers
        stream = asyncio.create_task(router.generate(text_request("hi", n=2, sampling={"max_tokens": 200})))
        victim = await made(decodes, 5 * PAGE)
        await victim.stop()
        router.workers.remove(victim)
        (other,) = [worker for worker in decodes if worker is not victim]
        results = await asyncio.gather(*(router.generate(request(20)) for _ in range(3)))
        assert all(len(sample.token_ids) == 8 for (sample,) in results)
        samples = await stream
        assert [sample.token_ids for sample in samples] == [remembered("hi", 200)] * 2
        assert any(not start.prefill_address for start in other.starts)
        assert all(len(call.token_ids) <= 4 * PAGE for call in router.workers[0].prefills)

    run_router(tmp_path, [worker("prefill", num_pages=4), worker("decode"), worker("decode")], test)


def test_a_prefill_worker_computes_an_orphan_as_long_as_it_can(tmp_path):
    async def test(router):
        prefill, *decodes = router.workers
        stream = asyncio.create_task(router.generate(text_request("hi", sampling={"max_tokens": 200})))
        victim = await made(decodes, 2 * PAGE)
        await victim.stop()
        router.workers.remove(victim)
        (sample,) = await stream
        assert sample.token_ids == remembered("hi", 200)
        assert [call.attempt for call in prefill.prefills] == [1, 2]
        assert all(bool(start.prefill_address) for worker in decodes for start in worker.starts)

    run_router(tmp_path, [worker("prefill", num_pages=20), worker("decode"), worker("decode")], test)


def test_a_stream_that_nobody_left_can_hold_ends_with_one_error_and_holds_up_nobody(tmp_path):
    async def test(router):
        prefill, large, small = router.workers
        stream = asyncio.create_task(router.refused(text_request("hi", sampling={"max_tokens": 400})))
        await made([large], 8 * PAGE)
        await large.stop()
        router.workers.remove(large)
        (sample,) = (await asyncio.gather(stream, router.generate(request(20))))[1]
        assert len(sample.token_ids) == 8
        error = stream.result()
        assert (type(error), error.reason) == (OverloadedError, "NO_FREE_PAGES")
        assert "decode worker" in str(error)
        assert f"holds {6 * PAGE};" in str(error)
        assert len(prefill.prefills) == 2
        assert len(small.starts) == 1

    run_router(tmp_path, [worker("prefill", num_pages=4), worker("decode"), worker("decode", num_pages=6)], test)


def test_a_prompt_that_only_a_worker_of_both_roles_holds_is_computed_there(tmp_path):
    async def test(router):
        prefill, both = router.workers
        (sample,) = await router.generate(request(100))
        assert len(sample.token_ids) == 8
        await router.generate(request(20))
        assert [len(call.token_ids) for call in prefill.prefills] == [20]
        assert [bool(start.prefill_address) for start in both.starts] == [False, True]

    run_router(tmp_path, [worker("prefill", num_pages=4), worker("both")], test)


def test_one_that_waits_is_refused_when_the_last_worker_that_could_hold_it_goes(tmp_path):
    async def test(router):
        large, _, _ = router.workers
        large.faults.prefill_gate.clear()
        first = asyncio.create_task(router.generate(request(100)))
        await wait_until(lambda: len(large.prefills) == 1)
        waits = asyncio.create_task(router.refused(request(100)))
        await router.generate(request(20))
        assert not waits.done()
        large.drain()
        error = await waits
        assert (error.reason, "holds 64;" in str(error)) == ("NO_FREE_PAGES", True)
        large.faults.prefill_gate.set()
        await first

    workers = [worker("prefill", max_step_tokens=16), worker("prefill", num_pages=4), worker("decode")]
    run_router(tmp_path, workers, test)


def test_a_worker_whose_context_is_too_short_is_not_given_what_needs_more(tmp_path):
    """It would end the answer early, or tell the client that its prompt is too long."""

    async def test(router):
        _, decode = router.workers
        decode.faults.join_gate.clear()
        first = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 100})))
        await wait_until(lambda: len(decode.starts) == 1)
        waits = asyncio.create_task(router.generate(text_request("b", sampling={"max_tokens": 100})))
        await wait_until(lambda: router.service._router.num_queued == 1)
        short = await router.add(worker("decode", max_context_tokens=64))
        await router.wait_states(["ready"] * 3)
        await router.generate(text_request("c", sampling={"max_tokens": 10}))
        assert [len(start.token_ids) for start in short.starts] == [2]
        decode.faults.join_gate.set()
        for prompt, (sample,) in zip("ab", await asyncio.gather(first, waits), strict=True):
            assert sample.token_ids == remembered(prompt, 100)

    run_router(tmp_path, [worker("prefill"), worker("decode", max_step_sequences=1)], test)


def test_a_worker_that_takes_nothing_for_a_moment_is_still_there(tmp_path):
    """One that refused work gets none before its next report; what only it can hold waits so long, and no longer."""

    async def test(router):
        large, small, _ = router.workers
        large.faults.prefill.append(OverloadedError("QUEUE_FULL", "made to refuse"))
        (sample,) = await router.generate(text_request("x" * 99, include_timings=True, sampling={"max_tokens": 8}))
        assert len(sample.token_ids) == 8
        assert sample.last.timings.num_attempts == 2
        assert small.prefills == []

    run_router(tmp_path, [worker("prefill"), worker("prefill", num_pages=4), worker("decode")], test)


def test_no_more_sequences_are_sent_than_a_step_has_tokens_for(tmp_path):
    """A step has a token at least for each: the rest would wait in the worker's queue, where nobody can move them."""

    async def test(router):
        await asyncio.gather(*(router.generate(request(4, max_tokens=20)) for _ in range(8)))
        assert most == 2

    most = 0
    decode = worker("decode", max_step_tokens=3)  # one of them is kept for other clients
    step = decode.step

    def watch():
        nonlocal most
        most = max(most, len(decode.sequences))
        step()

    decode.step = watch
    run_router(tmp_path, [worker("prefill"), decode], test)


def test_a_fleet_that_lacks_a_side_is_waited_for(tmp_path):
    async def test(router):
        with pytest.raises(HeadraceError) as caught:
            await router.generate(request(65))
        assert caught.value.reason == "NO_WORKERS"
        waits = asyncio.create_task(router.generate(request(20)))
        await router.add(worker("prefill", num_pages=4))
        await waits

    run_router(tmp_path, [worker("decode")], test, no_workers_timeout_s=0.3)


def has_place(router, request_id):
    return any(running.spec.request_id == request_id for running in router.service._router._running.values())


@pytest.mark.parametrize("hostile", [{}, {"n": 4}], ids=["many requests", "many samples"])
def test_one_request_does_not_wait_for_another_clients_many(tmp_path, hostile):
    async def test(router):
        decode = router.workers[1]
        decode.faults.join_gate.clear()

        def send(name, token, **fields):
            prompt = text_request("hi", request_id=name, sampling={"max_tokens": 4}, **fields)
            return asyncio.create_task(router.generate(prompt, token=token))

        running = []
        for i in range(30):  # one after the other: messages that come together are read in any order
            running.append(send(f"many-{i}", "a", **hostile))
            await wait_until(lambda name=f"many-{i}": has_place(router, name))
        await wait_until(lambda: bool(decode.starts))
        running.append(send("single", "b"))
        await wait_until(lambda: has_place(router, "single"))
        num_before = len(decode.starts)
        decode.faults.join_gate.set()
        await asyncio.gather(*running)
        started = [(start.request_id.rpartition("-")[0], start.sample_index) for start in decode.starts]
        assert started.index(("single", 0)) - num_before <= 2
        order = [name for name in started if name[0] != "single"]
        assert order == sorted(order, key=lambda name: (int(name[0].removeprefix("many-")), name[1]))

    run_router(tmp_path, [worker("prefill"), worker("decode", max_step_sequences=1)], test)


@pytest.mark.parametrize("what", ["slots", "pages"])
def test_one_clients_long_answers_leave_room_for_anothers_short_one(tmp_path, what):
    """They may hold a worker for minutes; one that ends there lets the next of theirs start."""

    async def test(router):
        decode = router.workers[1]
        calls = [request(4, max_tokens=500) for _ in range(8)]
        running = [asyncio.create_task(router.generate(call, token="a")) for call in calls]
        num_most = 7 if what == "slots" else 3
        await wait_until(lambda: len(decode.sequences) == num_most)
        (sample,) = await router.generate(request(4), token="b")
        assert len(sample.token_ids) == 8
        assert len(decode.sequences) == num_most, "the first client's are under way"
        for (sample,) in await asyncio.gather(*running):
            assert len(sample.token_ids) == 500

    options = {"max_step_sequences": 8} if what == "slots" else {"num_pages": 128}
    run_router(tmp_path, [worker("prefill"), worker("decode", **options)], test)


def test_samples_of_a_request_queue_one_behind_the_other(tmp_path):
    """A round looks at what waits: sixteen times as much of it would take sixteen times as long."""

    async def test(router):
        decode = router.workers[1]
        decode.faults.join_gate.clear()
        running = [asyncio.create_task(router.generate(request(4), token="a"))]
        await wait_until(lambda: bool(decode.starts))
        running += [asyncio.create_task(router.generate(text_request("hi", n=16, sampling={"max_tokens": 4})))]
        queue = router.service._router._flow._dispatcher._book._queue
        await wait_until(lambda: len(queue) > 0)
        assert len(queue) == 1
        decode.faults.join_gate.set()
        _, samples = await asyncio.gather(*running)
        assert [len(sample.token_ids) for sample in samples] == [4] * 16
        assert [start.sample_index for start in decode.starts[1:]] == list(range(16))

    run_router(tmp_path, [worker("prefill"), worker("decode", max_step_sequences=1)], test)


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        (("ipv4:10.0.0.7:40122", "a"), ("ipv4:10.0.0.7:50133", "a"), True),
        (("ipv4:10.0.0.7:40122", "a"), ("ipv4:10.0.0.7:40122", "b"), False),
        (("ipv4:10.0.0.7:40122", "a"), ("ipv4:10.0.0.7:40122", ""), False),
        (("ipv4:10.0.0.7:40122", ""), ("ipv4:10.0.0.8:40122", ""), False),
        (("ipv6:%5B::1%5D:40122", ""), ("ipv6:[::1]:50133", ""), True),
        (("ipv6:[2001:db8:0:1::1]:40122", ""), ("ipv6:[2001:db8:0:1::2]:40122", ""), True),
        (("ipv6:[2001:db8:0:1::1]:40122", ""), ("ipv6:[2001:db8:0:2::1]:40122", ""), False),
        (("unix:/run/router", ""), ("unix:/run/router", ""), True),
    ],
)
def test_a_client_is_its_token_and_its_address_without_the_port(first, second, is_same):
    callers = [caller_of(FakeContext(*peer)) for peer in (first, second)]
    assert (callers[0] == callers[1]) is is_same
    assert "40122" not in callers[0].name


class FakeContext:
    """A call's context, as far as it tells who calls."""

    def __init__(self, peer, token):
        self.peer = lambda: peer
        self.invocation_metadata = lambda: (("authorization", f"Bearer {token}"),) if token else ()
        self.auth_context = dict
