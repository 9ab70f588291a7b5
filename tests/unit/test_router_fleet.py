"""What the fleet can do is what the workers can that are there now: nothing stays of one that left."""

import asyncio
import gc
import itertools
import weakref

import pytest
from headrace_core import address_file
from headrace_core.errors import InvalidRequestError
from headrace_core.testing.fake_script import scripted
from headrace_core.testing.fake_worker import FakeWorker
from headrace_core.testing.garbler import no_message
from headrace_router.fleet.link import Backoff
from headrace_router.testing import (
    EOS,
    VOCAB_SIZE,
    RouterUnderTest,
    byte_ids,
    run_router,
    scripted_worker,
    text_request,
    wait_until,
)

LONG = text_request("x" * 299, sampling={"max_tokens": 3})
"""With the begin token, 300 tokens."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Believe at once what the list of workers says no more."""
    monkeypatch.setattr(address_file, "STANDS_S", 0.0)
    monkeypatch.setattr(address_file, "NOTHING_STANDS_S", 0.0)


def worker(role, context=4096, **options):
    options = {"vocab_size": VOCAB_SIZE, "next_token": scripted(byte_ids("abc")), **options}
    return FakeWorker(role, max_context_tokens=context, **options)


async def leave(router, worker):
    router.workers.remove(worker)
    router.write_workers()
    await router.wait_states(["ready"] * len(router.workers))


@pytest.mark.parametrize(
    ("workers", "context"),
    [
        ([("prefill", 4096), ("decode", 4096)], 4096),
        ([("prefill", 100), ("decode", 4096)], 100),
        ([("prefill", 4096), ("decode", 100)], 100),
        ([("prefill", 100), ("prefill", 4096), ("decode", 2048), ("decode", 100)], 2048),
        ([("both", 100), ("both", 4096)], 4096),
        ([("prefill", 100), ("both", 4096)], 4096),
        ([("prefill", 4096), ("decode", 100), ("both", 300)], 300),
        ([("decode", 4096), ("both", 100)], 100),
        ([("prefill", 100), ("decode", 4096), ("both", 50)], 100),
    ],
)
def test_the_context_is_the_most_that_some_pair_can_hold(tmp_path, workers, context):
    async def test(router):
        assert (await router.info()).max_context_tokens == context

    run_router(tmp_path, [worker(role, most) for role, most in workers], test)


def test_a_small_worker_that_joins_and_leaves_leaves_no_limit_behind(tmp_path):
    async def test(router):
        await router.generate(LONG)
        small = await router.add(worker("both", 100))
        await router.wait_states(["ready", "ready"])
        assert (await router.info()).max_context_tokens == 4096
        for _ in range(3):
            await router.generate(LONG)
        assert small.starts == [], "it goes to whom it fits"
        await leave(router, small)
        await router.generate(LONG)

    run_router(tmp_path, [worker("both")], test)


@pytest.mark.parametrize("how", ["unlisted", "stopped", "draining", "not serving"])
def test_a_large_worker_that_leaves_takes_its_limit_along(tmp_path, how):
    async def test(router):
        small, large = router.workers
        await router.generate(LONG)
        if how == "unlisted":
            await leave(router, large)
        elif how == "stopped":
            await large.stop()
            await router.wait_states(["ready", "unreachable"])
        else:
            large.drain() if how == "draining" else await large.set_ready(False)
            await router.wait_states(["ready", "draining"])
        assert (await router.info()).max_context_tokens == 100
        assert (await router.refused(LONG)).reason == "PROMPT_TOO_LONG"
        await small.set_ready(True)
        assert (await router.generate(text_request("a", sampling={"max_tokens": 3})))[0].text == "abc"

    run_router(tmp_path, [worker("both", 100, num_pages=128), worker("both")], test)


@pytest.mark.parametrize("context", [100, 4096])
def test_a_request_that_comes_while_nobody_is_there_is_checked_against_who_comes(tmp_path, context):
    async def test(router):
        (first,) = router.workers
        await router.generate(LONG)
        await leave(router, first)
        info = await router.info()
        assert (info.max_context_tokens, info.model_fingerprint) == (0, "")
        running = asyncio.create_task(router.generate(LONG))
        await wait_until(lambda: router.service._router.num_queued == 1)
        await router.add(worker("both", context, fingerprint="beef" * 16))
        if context == 100:
            with pytest.raises(InvalidRequestError, match="context holds 100"):
                await running
        else:
            assert (await running)[0].text == "abc"

    run_router(tmp_path, [worker("both")], test)


def test_end_tokens_and_vocabulary_are_those_of_the_workers_that_are_there(tmp_path):
    async def test(router):
        fleet = router.service._router.fleet
        (first,) = router.workers
        assert (fleet.model.vocab_size, fleet.model.eos_token_ids) == (VOCAB_SIZE, (3,))
        await leave(router, first)
        await router.add(worker("both", vocab_size=999, fingerprint="beef" * 16))
        await router.wait_states(["ready"])
        assert (fleet.model.vocab_size, fleet.model.eos_token_ids) == (999, ())

    run_router(tmp_path, [worker("both", eos_token_ids=[3])], test)


def test_a_worker_that_ends_sequences_elsewhere_is_refused_and_nobodys_text_changes(tmp_path):
    async def test(router):
        async def text():
            return (await router.generate(text_request("x", sampling={"max_tokens": 12})))[0].text

        assert await text() == "Hello, wörl"
        other = await router.add(scripted_worker("decode", eos_token_ids=[ord("l"), ord("o")]))
        await router.wait_states(["ready", "ready", "refused"])
        assert await text() == "Hello, wörl"
        (status,) = [each for each in (await router.info()).workers if each.address == other.address]
        assert "its end-of-sequence ids are [108, 111]; this fleet's are [257]" in status.detail
        await router.add(scripted_worker("decode", eos_token_ids=[EOS, EOS]))
        await router.wait_states(["ready", "ready", "ready", "refused"])

    workers = [scripted_worker(role, eos_token_ids=[EOS]) for role in ("prefill", "decode")]
    run_router(tmp_path, workers, test)


def test_of_two_models_that_join_at_once_one_is_refused(tmp_path):
    async def main():
        both = [worker("both"), worker("both", fingerprint="beef" * 16)]
        asked = asyncio.Event()
        names = set()
        for each in both:
            real = each._servicer.WatchLoad

            async def watch(request, context, each=each, real=real):
                # Both were asked who they are, and found fitting, before either says how it is.
                names.add(each.address)
                if len(names) == len(both):
                    asked.set()
                await asked.wait()
                async for load in real(request, context):
                    yield load

            each._servicer.WatchLoad = watch
        async with RouterUnderTest(tmp_path, workers=both) as router:
            await router.wait_states(["ready", "refused"])

    asyncio.run(main())


def test_an_address_where_nobody_is_is_asked_less_and_less_and_again_soon_once_somebody_was():
    backoff, now_s, tries = Backoff(), 100.0, []
    while now_s < 4000.0:
        tries.append(now_s)
        now_s += backoff.pause_s(now_s)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[:6] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    for tried, pause in zip(tries, pauses, strict=False):
        assert pause <= max(1.0, 0.1 * (tried - 100.0)) + 1e-6, "back after t seconds, it is noticed within t / 10"
    assert pauses[-1] == pytest.approx(30.0)
    backoff.on_joined()
    assert [backoff.pause_s(now_s) for _ in range(3)] == pytest.approx([0.1, 0.2, 0.4])


def test_a_call_under_way_keeps_no_worker_whose_streams_broke_and_which_is_listed_no_more(tmp_path):
    async def test(router):
        prefill, _ = router.workers
        fleet = router.service._router.fleet
        prefill.faults.prefill_gate.clear()
        running = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 3})))
        await wait_until(lambda: len(prefill.prefills) == 1)
        (link,) = (each for each in fleet.links if each.address == prefill.address)
        prefill.garbler.rewrites["WatchLoad"] = no_message
        prefill.on_change()
        await router.wait_states(["ready", "refused"])
        router.workers.remove(prefill)
        await router.add(worker("prefill"))
        assert (await running)[0].text == "abc"
        await router.wait_states(["ready", "ready"])
        assert link not in fleet.links
        prefill.faults.prefill_gate.set()

    run_router(tmp_path, [worker("prefill"), worker("decode")], test)


def test_nothing_is_kept_of_workers_that_left(tmp_path):
    async def test(router):
        fleet = router.service._router.fleet
        left = []

        def num_series():
            return sum(len(list(metric.samples)) for metric in router.service.registry.collect())

        def num_kept():
            gc.collect()
            return sum(ref() is not None for ref in left)

        async def cycle():
            guest = await router.add(worker("both", step_s=0.001, num_pages=4096))
            await router.wait_states(["ready", "ready"])
            (link,) = (each for each in fleet.links if each.address == guest.address)
            left.extend([weakref.ref(link), weakref.ref(link.worker)])
            del link
            texts = [router.generate(text_request("a", sampling={"max_tokens": 200})) for _ in range(4)]
            running = asyncio.gather(*texts)
            await wait_until(lambda: bool(guest.sequences))
            await guest.stop()
            await router.wait_states(["ready", "unreachable"])
            await running
            await leave(router, guest)

        for number in range(1, 4):
            await cycle()
            assert len(left) == 2 * number
            if number == 1:
                before = num_series()
        await wait_until(lambda: not num_kept())
        await wait_until(lambda: not fleet._leaving)
        names = sorted(task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("link-"))
        assert names == [f"link-{each.address}" for each in router.workers]
        assert num_series() == before

    run_router(tmp_path, [worker("both")], test)
