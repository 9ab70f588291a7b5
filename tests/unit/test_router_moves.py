"""A decode worker drains: what runs there is placed elsewhere and takes its pages along; clients see nothing of it."""

import asyncio

import pytest
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import OverloadedError, UnavailableError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.worker_pair import running
from headrace_core.wire import encode_sampling
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.testing import (
    VOCAB_SIZE,
    RouterUnderTest,
    check_timings,
    remembered,
    remembering_worker,
    run_router,
    text_request,
    tokens_request,
    wait_until,
)

from tests.unit.test_router_samples import At, counted

PROMPT = "a prompt that is longer than two pages of 16 tokens"
PAGE = 16


def fleet(*roles, **options):
    return [remembering_worker(role, **{"step_s": 0.002, **options}) for role in roles]


def ask(router, *, num_tokens=80, **more):
    request = text_request(PROMPT, include_timings=True, sampling={"max_tokens": num_tokens}, **more)
    return asyncio.create_task(router.generate(request))


async def running_at(*workers, num_made=1):
    """Return those of the workers that run something of which so many tokens were made, and the others."""
    await wait_until(lambda: any(s.num_made >= num_made for w in workers for s in w.sequences.values()))
    busy = [worker for worker in workers if worker.sequences]
    return *busy, *(worker for worker in workers if worker not in busy)


def starts(worker):
    return [(start.attempt, start.takes_prefix) for start in worker.starts]


def cancels(worker):
    return [(cancel.attempt, cancel.keeps_pages) for cancel in worker.cancels]


def test_what_runs_at_a_worker_that_drains_goes_on_elsewhere_from_its_pages(tmp_path):
    async def test(router):
        _, *decodes = router.workers
        asked = ask(router)
        first, second = await running_at(*decodes)
        first.drain()
        await wait_until(lambda: second.starts)
        (start,) = second.starts
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 80)
        assert (start.attempt, start.takes_prefix, start.local_below) == (2, True, PAGE)
        assert start.cached_prefix.address == first.address
        assert start.cached_prefix.incarnation == first.incarnation
        assert start.cached_prefix.num_tokens == (len(start.token_ids) - 1) // PAGE * PAGE
        assert start.num_prompt_tokens == len(PROMPT) + 1
        await wait_until(lambda: first.is_empty)
        assert cancels(first) == [(1, True), (1, False)]
        assert router.metric("headrace_moved_sequences_total") == 1
        assert not router.metric("headrace_retries_total", reason="DRAINING")
        assert sample.last.timings.num_attempts == 1
        assert "retry" in check_timings(sample.last)

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


def test_its_pages_are_kept_until_it_runs_elsewhere(tmp_path):
    async def test(router):
        _, *decodes = router.workers
        asked = ask(router)
        first, second = await running_at(*decodes)
        second.faults.join_gate.clear()
        first.drain()
        await wait_until(lambda: second.starts)
        await router.info()
        assert cancels(first) == [(1, True)]
        second.faults.step_gate.clear()
        second.faults.join_gate.set()
        await wait_until(lambda: len(first.cancels) == 2)
        assert cancels(first)[1] == (1, False)
        assert not asked.done()
        second.faults.step_gate.set()
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 80)

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


@pytest.mark.parametrize("roles", [["prefill", "decode"], ["both"]])
def test_where_no_other_could_take_it_it_ends_where_it_is(tmp_path, roles):
    async def test(router):
        worker = router.workers[-1]
        asked = ask(router)
        await running_at(worker)
        worker.drain()
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 80)
        assert starts(worker) == [(1, False)]
        assert cancels(worker) == []
        assert not router.metric("headrace_moved_sequences_total")

    run_router(tmp_path, fleet(*roles), test)


def test_moves_count_as_no_attempts(tmp_path):
    async def test(router):
        _, *left = router.workers
        asked = ask(router, num_tokens=300)
        while len(left) > 1:
            worker, *left = await running_at(*left)
            worker.faults.step_gate.clear()  # it ends nothing there, however late the router hears that it drains
            worker.drain()
            await wait_until(lambda worker=worker: not worker.sequences)
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 300)
        assert router.metric("headrace_moved_sequences_total") == 2
        assert sample.last.timings.num_attempts == 1

    run_router(tmp_path, fleet("prefill", "decode", "decode", "decode"), test, max_attempts=1)


@pytest.mark.parametrize(
    "error", [OverloadedError("NO_FREE_PAGES", "full"), UnavailableError("DRAINING", "it drains as well")]
)
def test_one_that_the_new_worker_refuses_is_tried_again_with_the_same_pages(tmp_path, error):
    async def test(router):
        _, *decodes = router.workers
        asked = ask(router)
        first, *others = await running_at(*decodes)
        for other in others:
            other.faults.join.append(error)
        first.drain()
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 80)
        attempts = sorted(start for other in others for start in starts(other))
        assert attempts == [(2, True), (3, True), (4, True)]
        assert router.metric("headrace_retries_total", reason=error.reason) == 2
        await wait_until(lambda: first.is_empty)
        assert cancels(first) == [(1, True), (1, False)]

    run_router(tmp_path, fleet("prefill", "decode", "decode", "decode"), test, max_attempts=3)


def test_the_worker_that_keeps_the_pages_is_lost_meanwhile(tmp_path):
    async def test(router):
        _, *decodes = router.workers
        asked = ask(router)
        first, second = await running_at(*decodes)
        second.faults.join_gate.clear()
        first.drain()
        await wait_until(lambda: second.starts)
        router.workers.remove(first)
        await first.stop()
        second.faults.join.append(OverloadedError("NO_FREE_PAGES", "full"))
        second.faults.join_gate.set()
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 80)
        assert starts(second) == [(2, True), (3, False)]

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


def test_what_has_not_joined_is_placed_elsewhere_and_keeps_nothing(tmp_path):
    async def test(router):
        prefill, *decodes = router.workers
        for worker in decodes:
            worker.faults.join_gate.clear()
        asked = ask(router)
        await wait_until(lambda: prefill.num_leases == 1)
        first, second = sorted(decodes, key=lambda worker: not worker.starts)
        first.drain()
        await wait_until(lambda: second.starts)
        second.faults.join_gate.set()
        (sample,) = await asked
        assert sample.token_ids == remembered(PROMPT, 80)
        assert starts(second) == [(2, False)]
        assert cancels(first) == [(1, False)]

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


@pytest.mark.parametrize("how", ["waits", "ends", "leaves"])
def test_one_that_waits_for_a_place_elsewhere_runs_on_meanwhile(tmp_path, how):
    """The other worker runs one sequence at a time."""

    async def test(router):
        _, *decodes = router.workers
        for worker in decodes:
            worker.faults.step_gate.clear()
        asked = {num_tokens: ask(router, num_tokens=num_tokens) for num_tokens in (100, 110)}
        await wait_until(lambda: all(worker.sequences for worker in decodes))
        first, second = decodes
        await router.info()
        first.drain()
        await router.wait_states(["draining", "ready", "ready"])
        assert len(second.starts) == 1
        if how == "waits":
            second.faults.step_gate.set()
            await wait_until(lambda: len(second.starts) == 2)
            assert cancels(first) == [(1, True)]
        elif how == "leaves":
            (waiting,) = first.sequences.values()
            asked.pop(waiting.params.max_tokens).cancel()
            await wait_until(lambda: first.is_empty)  # before the other leaves: it would move to the place that is free
            (other,) = asked.values()
            other.cancel()
            await wait_until(lambda: second.is_empty)
            assert cancels(first) == [(1, False)]
        first.faults.step_gate.set()
        if how != "leaves":
            if how == "ends":
                await wait_until(lambda: first.is_empty)
                second.faults.step_gate.set()
            samples = await asyncio.gather(*asked.values())
            assert [s.token_ids for (s,) in samples] == [remembered(PROMPT, n) for n in asked]
            assert len(second.starts) == (2 if how == "waits" else 1)
        assert (router.metric("headrace_moved_sequences_total") or 0) == (how == "waits")
        assert not len(router.service._router._flow._dispatcher._book)

    run_router(tmp_path, [*fleet("prefill"), *fleet("decode", "decode", max_step_sequences=1)], test)


def test_all_samples_of_a_request_move_each_with_its_own(tmp_path):
    async def test(router):
        _, *decodes = router.workers
        for worker in decodes:
            worker.faults.step_gate.clear()
        asked = ask(router, n=3)
        await wait_until(lambda: sum(len(worker.sequences) for worker in decodes) == 3)
        first, second = sorted(decodes, key=lambda worker: -len(worker.sequences))
        assert len(first.sequences) == 3
        for worker in decodes:
            worker.faults.step_gate.set()
        first.drain()
        samples = await asked
        assert [sample.token_ids for sample in samples] == [remembered(PROMPT, 80)] * 3
        assert starts(second) == [(2, True)] * 3
        assert sorted(start.sample_index for start in second.starts) == [0, 1, 2]
        await wait_until(lambda: first.is_empty)

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


@async_test
async def test_real_workers_move_it_twice_and_the_client_is_told_what_each_move_took(tmp_path):
    """Pages of 4 tokens; the steps of each worker that leaves are held while it does."""
    models = [FakeModel(vocab_size=VOCAB_SIZE) for _ in range(3)]
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded(FakeModel(vocab_size=VOCAB_SIZE)))
    decoders = [DecodeService(DecodeSettings(model="."), loader=lambda _, m=m: loaded(m)) for m in models]
    sampling = SamplingParams(temperature=1.1, seed=5, max_tokens=150, ignore_eos=True, top_logprobs=1)
    request = tokens_request(*range(1, 44), sampling=encode_sampling(sampling), include_timings=True)
    async with running(prefiller, *decoders) as addresses:
        async with RouterUnderTest(tmp_path) as router:
            router.workers = [At(address) for address in addresses]
            router.write_workers()
            await router.wait_states(["ready"] * 4)
            await router.generate(tokens_request(*range(1, 44), sampling={"max_tokens": 1}))
            for model in models:
                model.hold(after=30)
            asked = asyncio.create_task(router.generate(request))
            left = set(range(3))
            for _ in range(2):
                await wait_until(lambda: any(models[i]._is_held for i in left))
                (leaving,) = [i for i in left if models[i]._is_held]
                left.remove(leaving)
                draining = asyncio.create_task(decoders[leaving].drain())
                await router.wait_states(["draining"] * (3 - len(left)) + ["ready"] * (1 + len(left)))
                models[leaving].release()
                await draining
            models[left.pop()].release()
            (sample,) = await asked
            assert counted(prefiller, "headrace_step_tokens_total") == 43 + 3, "nothing for the moves"
            (alone,) = await router.generate(request)
        assert sample.token_ids == alone.token_ids
        assert len(sample.logprobs) == 150
        assert sample.last.usage.num_cached_tokens == 40, "of the prompt"
        timings = sample.last.timings
        assert timings.num_attempts == 1
        names = [phase.name for phase in timings.phases]
        assert names.count("retry") == names.count("transfer") - 1 == 2
        assert timings.num_transfer_pages > 11 + 2 * 11
        assert sum(counted(decoder, "headrace_prefix_fetches_total", outcome="taken") for decoder in decoders) == 2


def loaded(model: FakeModel):
    return loaded_fake_model(num_pages=256, model=model, fingerprint="fa4e" * 16)
