"""The samples of a request: the first computes and moves the prompt, the others find it where it went."""

import asyncio
from dataclasses import dataclass

from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_core.wire import encode_sampling
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.testing import (
    VOCAB_SIZE,
    RouterUnderTest,
    remembered,
    remembering_worker,
    run_router,
    text_request,
    tokens_request,
    wait_until,
)

PROMPT = "a prompt that is longer than a page of 16 tokens"
"""48 tokens: with <bos> they are three full pages and a token."""
MOST_TOKENS = {"max_tokens": 6}


def fleet(*roles, **options):
    return [remembering_worker(role, **options) for role in roles]


async def check_request(router, n=4, prompt=PROMPT, **sampling):
    """Check what all samples of a request are."""
    samples = await router.generate(text_request(prompt, n=n, sampling={**MOST_TOKENS, **sampling}))
    num_tokens = {**MOST_TOKENS, **sampling}["max_tokens"]
    assert [sample.token_ids for sample in samples] == [remembered(prompt, num_tokens)] * n


def starts_of(worker):
    return sorted((start.sample_index, start.local_below) for start in worker.starts)


def test_the_others_start_where_the_first_has_joined_and_compute_what_is_left_of_a_page(tmp_path):
    async def test(router):
        prefill, one, other = router.workers
        for worker in (one, other):
            worker.faults.join_gate.clear()
        request = asyncio.create_task(check_request(router))
        await wait_until(lambda: prefill.num_leases == 1)
        await router.info()
        assert len(prefill.prefills) == len(one.starts) + len(other.starts) == 1, "the others wait"
        for worker in (one, other):
            worker.faults.join_gate.set()
        await request
        first = one if one.starts else other
        assert starts_of(first) == [(0, 0), (1, 16), (2, 16), (3, 16)]
        assert {start.prefill_address for start in first.starts} == {prefill.address}, "should the pages be gone"
        assert router.workers[1].starts == [] or router.workers[2].starts == []

    run_router(tmp_path, fleet("prefill", "decode", "decode"), test)


def test_one_worker_for_all_has_the_prompt_when_the_first_token_is_there(tmp_path):
    async def test(router):
        one, other = router.workers
        for worker in (one, other):
            worker.faults.step_gate.clear()
        request = asyncio.create_task(check_request(router))
        await wait_until(lambda: bool(one.sequences or other.sequences))
        await router.info()
        assert len(one.starts) + len(other.starts) == 1, "it has joined, and computes"
        for worker in (one, other):
            worker.faults.step_gate.set()
        await request
        assert [len(worker.starts) for worker in (one, other)] in ([4, 0], [0, 4])

    run_router(tmp_path, fleet("both", "both"), test)


def test_of_a_prompt_without_a_full_page_nothing_is_waited_for(tmp_path):
    async def test(router):
        prefill, decode = router.workers
        decode.faults.join_gate.clear()
        request = asyncio.create_task(check_request(router, prompt="x" * 15))
        await wait_until(lambda: len(prefill.prefills) == 4)
        decode.faults.join_gate.set()
        await request
        assert {start.local_below for start in decode.starts} == {0}

    run_router(tmp_path, fleet("prefill", "decode"), test)


def test_where_the_first_ones_worker_has_no_room_another_takes_the_prompt(tmp_path):
    """Each runs two at a time of a client; a third place is kept for others."""

    async def test(router):
        _, one, other = router.workers
        for worker in (one, other):
            worker.faults.step_gate.clear()
        request = asyncio.create_task(check_request(router))
        await wait_until(lambda: len(one.starts) + len(other.starts) == 4)
        for worker in (one, other):
            worker.faults.step_gate.set()
        await request
        first, second = (one, other) if one.starts[0].sample_index == 0 else (other, one)
        assert (starts_of(first), starts_of(second)) == ([(0, 0), (1, 16)], [(2, 0), (3, 0)])

    run_router(tmp_path, [*fleet("prefill"), *fleet("decode", "decode", max_step_sequences=3)], test)


def test_a_first_token_that_is_the_last_one_lets_the_others_start(tmp_path):
    async def test(router):
        await check_request(router, max_tokens=1)
        addresses = {start.prefill_address for worker in router.workers[2:] for start in worker.starts}
        assert len(addresses) == 1, "whose cache has the prompt"
        assert len([*router.workers[0].prefills, *router.workers[1].prefills]) == 4

    run_router(tmp_path, fleet("prefill", "prefill", "decode", "decode"), test)


def test_the_others_wait_for_the_first_ones_next_attempt_and_not_for_a_worker_that_is_lost(tmp_path):
    async def test(router):
        prefill, one, other = router.workers
        for worker in (one, other):
            worker.faults.join_gate.clear()
        request = asyncio.create_task(check_request(router, max_tokens=40))
        await wait_until(lambda: prefill.num_leases == 1)
        victim, survivor = (one, other) if one.starts else (other, one)
        await victim.stop()
        router.workers.remove(victim)
        survivor.faults.join_gate.set()
        await request
        assert sorted(start.sample_index for start in survivor.starts) == [0, 1, 2, 3]

    run_router(tmp_path, fleet("prefill", "decode", "decode", step_s=0.002), test)


def test_samples_whose_worker_is_lost_go_on_elsewhere(tmp_path):
    async def test(router):
        _, one, other = router.workers
        request = asyncio.create_task(check_request(router, max_tokens=60))
        await wait_until(lambda: len(one.sequences) == 4 or len(other.sequences) == 4)
        victim, survivor = (one, other) if one.sequences else (other, one)
        await victim.stop()
        router.workers.remove(victim)
        await request
        assert {start.attempt for start in survivor.starts} == {2}

    run_router(tmp_path, fleet("prefill", "decode", "decode", step_s=0.005), test)


IDS = [(7 * i) % 90 + 1 for i in range(43)]
"""With pages of 4 tokens: ten full pages, and three tokens."""
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, seed=77, max_tokens=12, ignore_eos=True)


def real_fleet() -> tuple[PrefillService, DecodeService]:
    def loaded():
        return loaded_fake_model(num_pages=256, model=FakeModel(vocab_size=VOCAB_SIZE), fingerprint="fa4e" * 16)

    return (
        PrefillService(PrefillSettings(model="."), loader=lambda _: loaded()),
        DecodeService(DecodeSettings(model="."), loader=lambda _: loaded()),
    )


@dataclass
class At:
    address: str


def counted(service, name: str, **labels: str) -> float:
    return service.registry.get_sample_value(name, labels) or 0.0


@async_test
async def test_eight_samples_prefill_and_move_their_prompt_once_and_have_the_tokens_of_each_alone(tmp_path):
    prefiller, decoder = real_fleet()
    lone_prefiller, lone_decoder = real_fleet()
    async with running(prefiller, decoder, lone_prefiller, lone_decoder) as (
        prefill,
        decode,
        lone_prefill,
        lone_decode,
    ):
        async with RouterUnderTest(tmp_path) as router:
            router.workers = [At(prefill), At(decode)]
            router.write_workers()
            await router.wait_states(["ready", "ready"])
            sampling = encode_sampling(SAMPLED)
            samples = await router.generate(tokens_request(*IDS, n=8, sampling=sampling, include_timings=True))
        assert counted(prefiller, "headrace_step_tokens_total") == 43
        num_rows = sum(len(sample.token_ids) - 1 for sample in samples)
        assert counted(decoder, "headrace_step_tokens_total") == num_rows + 7 * 3, (
            "what is left of a page, and a token each"
        )
        assert [sample.last.timings.num_transfer_pages for sample in samples] == [11, *[0] * 7]
        assert counted(decoder, "headrace_transfer_bytes_total", transport="grpc", direction="received") == 11 * 128
        async with MiniRouter(prefill=lone_prefill, decode=lone_decode) as alone:
            for index, sample in enumerate(samples):
                expected = await alone.generate(f"r{index}", IDS, params=SAMPLED, sample_index=index)
                assert sample.token_ids == expected
        assert len({tuple(sample.token_ids) for sample in samples}) == 8
