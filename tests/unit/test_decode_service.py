"""The decode worker over real gRPC with the fake model."""

import asyncio
import dataclasses

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import (
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
)
from headrace_core.request import FinishReason, SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, seed=77, max_tokens=24, ignore_eos=True)
PENALISED = dataclasses.replace(
    SAMPLED, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, top_k=40, min_p=0.01
)
PROMPT = [(7 * i) % 90 + 1 for i in range(43)]


def service(*, num_pages: int = 128, model: FakeModel | None = None, **settings) -> DecodeService:
    settings = {"role": "both", **settings}
    loaded = loaded_fake_model(num_pages=num_pages, model=model)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded)


def prefill_service(**settings) -> PrefillService:
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded_fake_model(num_pages=128))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@async_test
async def test_many_at_once_give_the_tokens_of_each_alone(params: SamplingParams):
    prompts = {f"r{i}": PROMPT[: 5 + 3 * i] for i in range(10)}
    async with (
        running(prefill_service(max_step_tokens=16), service(role="decode"), service(max_step_sequences=1)) as (
            a,
            b,
            c,
        ),
        MiniRouter(prefill=a, decode=b) as split,
        MiniRouter(decode=c) as alone,
    ):
        together = await asyncio.gather(*(split.generate(name, p, params=params) for name, p in prompts.items()))
        expected = [await alone.generate_colocated(name, p, params=params) for name, p in prompts.items()]
        assert together == expected


@async_test
async def test_preemption_changes_no_token():
    prompts = {f"r{i}": PROMPT[: 5 + i] for i in range(6)}
    model = FakeModel()
    small = service(num_pages=20, role="decode", model=model)

    def num_arrived() -> float | None:
        return small.registry.get_sample_value("headrace_transfer_seconds_count", {"transport": "grpc"})

    async with (
        running(prefill_service(), small, service(max_step_sequences=1)) as (a, b, c),
        MiniRouter(prefill=a, decode=b) as split,
        MiniRouter(decode=c) as alone,
    ):
        # All are there before any gets far: the first step waits until all are queued, the second until all arrived.
        model.hold()
        generating = asyncio.gather(*(split.generate(name, p, params=SAMPLED) for name, p in prompts.items()))
        await eventually(lambda: small.num_sequences == 6, "all are queued")
        model.hold(after=1)
        await eventually(lambda: num_arrived() == 6, "all arrived")
        model.release()
        together = await generating
        expected = [await alone.generate_colocated(name, p, params=SAMPLED) for name, p in prompts.items()]
        assert together == expected
        assert small.registry.get_sample_value("headrace_preemptions_total")


@async_test
async def test_a_later_attempt_goes_on_where_the_first_stopped():
    async with (
        running(prefill_service(), service(role="decode")) as (a, b),
        MiniRouter(prefill=a, decode=b) as router,
    ):
        whole = await router.generate("whole", PROMPT, params=PENALISED)
        rest = await router.generate(
            "rest", [*PROMPT, *whole[:9]], params=PENALISED, attempt=2, num_prompt_tokens=len(PROMPT)
        )
        assert rest == whole[9:]


@async_test
async def test_samples_of_one_request_differ_and_repeat():
    async with (
        running(prefill_service(), service(role="decode")) as (a, b),
        MiniRouter(prefill=a, decode=b) as router,
    ):
        first = [await router.generate("r", PROMPT, params=SAMPLED, sample_index=i) for i in range(3)]
        again = [await router.generate("r", PROMPT, params=SAMPLED, sample_index=i) for i in range(3)]
        assert first == again
        assert len({tuple(tokens) for tokens in first}) == 3


@async_test
async def test_a_stop_token_ends_the_sequence():
    async with running(service()) as (address,), MiniRouter(decode=address) as router:
        whole = await router.generate_colocated("a", PROMPT, params=GREEDY)
        stop = next(token for token in whole[3:] if token not in whole[:3])
        collected = router.start("b", PROMPT, params=dataclasses.replace(GREEDY, stop_token_ids=(stop,)))
        await collected.wait_end()
        assert collected.token_ids == whole[: whole.index(stop) + 1]
        assert collected.finish is FinishReason.STOP


@async_test
async def test_the_context_window_ends_the_sequence():
    async with running(service(num_pages=160)) as (address,), MiniRouter(decode=address) as router:
        collected = router.start("a", [1] * 500, params=GREEDY)
        await collected.wait_end()
        assert len(collected.token_ids) == 12
        assert collected.finish is FinishReason.LENGTH


@async_test
async def test_joining_tells_what_was_moved():
    decoder = service(role="decode")
    async with running(prefill_service(), decoder) as (a, b), MiniRouter(prefill=a, decode=b) as router:
        collected = router.start("r", PROMPT, params=GREEDY)
        joined = await collected.wait_joined()
        assert (joined.transport, joined.num_transfer_pages, joined.transfer_bytes) == ("grpc", 11, 11 * 128)
        await collected.wait_end()
        assert collected.prefilled.tokens_sha256 == hash_tokens(PROMPT)
        labels = {"transport": "grpc", "direction": "received"}
        assert decoder.registry.get_sample_value("headrace_transfer_bytes_total", labels) == 11 * 128
        assert decoder.registry.get_sample_value("headrace_sampled_tokens_total") == 23


@async_test
async def test_a_first_token_that_ends_the_sequence_moves_nothing():
    decoder = service(role="decode")
    async with running(prefill_service(), decoder) as (a, b), MiniRouter(prefill=a, decode=b) as router:
        collected = router.start("r", PROMPT, params=dataclasses.replace(GREEDY, max_tokens=1))
        assert len(await collected.tokens()) == 1
        assert (collected.finish, collected.joined) == (FinishReason.LENGTH, None)


@pytest.mark.parametrize(("local_below", "is_local"), [(2, False), (3, True), (99, True)])
@async_test
async def test_rule_11_a_worker_that_lacks_few_enough_tokens_computes_them_itself(local_below: int, is_local: bool):
    """Of 43 tokens it has the 40 of its full pages, when it has computed them once."""
    async with (
        running(prefill_service(), service(role="decode")) as (a, b),
        MiniRouter(prefill=a, decode=b) as router,
    ):
        first = await router.generate("first", PROMPT, params=GREEDY)
        again = router.start("again", PROMPT, params=GREEDY, local_below=local_below)
        assert await again.tokens() == first
        assert (again.prefilled is None, again.joined.transport == "") == (is_local, is_local)
        assert again.joined.num_cached_tokens == 40


@async_test
async def test_rule_12_sessions_are_admitted_in_turn():
    model = FakeModel()
    worker = service(model=model, max_step_sequences=1)
    async with (
        running(worker) as (address,),
        MiniRouter(decode=address) as greedy,
        MiniRouter(decode=address) as modest,
    ):
        model.hold()
        first = greedy.start("first", PROMPT, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        many = [greedy.start(f"g{i}", PROMPT[: 5 + i], params=GREEDY) for i in range(3)]
        await eventually(lambda: worker.num_sequences == 4, "one runs, the others wait")
        one = modest.start("m", PROMPT[:9], params=GREEDY)
        await eventually(lambda: worker.num_sequences == 5, "the other router's came last")
        model.hold(after=3 * 24)
        for collected in (first, many[0], one):
            assert len(await collected.tokens()) == 24
        assert [collected.token_ids for collected in many[1:]] == [[], []]
        model.release()
        for collected in many:
            await collected.wait_end()


@async_test
async def test_rule_12_routers_may_give_their_sequences_the_same_names():
    async with (
        running(prefill_service(), service(role="decode")) as (a, b),
        MiniRouter(prefill=a, decode=b) as one,
        MiniRouter(prefill=a, decode=b) as other,
    ):
        started = [router.start("same", PROMPT, params=GREEDY) for router in (one, other)]
        assert started[0].number == started[1].number
        tokens = [await collected.tokens() for collected in started]
        assert tokens[0] == tokens[1]


@async_test
async def test_a_time_that_no_clock_can_hold_is_cut():
    async with running(prefill_service(), service(role="decode")) as (a, b), MiniRouter(prefill=a, decode=b) as router:
        assert len(await router.generate("r", PROMPT, params=GREEDY, timeout_s=1.8e16)) == 24


@async_test
async def test_the_deadline_ends_a_sequence_wherever_it_is():
    model = FakeModel()
    async with running(service(model=model)) as (address,), MiniRouter(decode=address) as router:
        model.hold()
        collected = router.start("r", PROMPT, params=GREEDY, timeout_s=0.05)
        error = await collected.wait_failure()
        assert (error.reason, collected.side) == ("DEADLINE_EXCEEDED", decode_service_pb2.FAILURE_SIDE_DECODE)
        model.release()


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"token_ids": []}, InvalidRequestError, "EMPTY_PROMPT"),
        ({"token_ids": [97]}, InvalidRequestError, "BAD_TOKEN"),
        ({"token_ids": [1] * 512}, InvalidRequestError, "PROMPT_TOO_LONG"),
        ({"request_id": ""}, InvalidRequestError, "BAD_REQUEST"),
        ({"params": SamplingParams(temperature=0.0)}, InvalidRequestError, "BAD_SAMPLING"),
        ({"params": SamplingParams(seed=1, logit_bias={97: 1.0})}, InvalidRequestError, "BAD_TOKEN"),
    ],
)
@async_test
async def test_bad_input_is_refused_by_name(change, error: type[HeadraceError], reason: str):
    call = {"request_id": "r", "token_ids": PROMPT, "params": GREEDY, **change}
    async with running(service()) as (address,), MiniRouter(decode=address) as router:
        collected = router.start(**call)
        failure = await collected.wait_failure()
        assert (type(failure), failure.reason) == (error, reason)
        assert collected.side == decode_service_pb2.FAILURE_SIDE_DECODE


@async_test
async def test_a_worker_that_only_decodes_prefills_what_comes_without_a_handoff():
    """In chunks of its token budget, beside the sequences it runs, and with the tokens that a hand-off gives."""
    decoder = service(role="decode", max_step_tokens=8)
    async with (
        running(prefill_service(), decoder) as (a, b),
        MiniRouter(prefill=a, decode=b) as router,
    ):
        whole = await router.generate("whole", PROMPT, params=PENALISED)
        beside = router.start("beside", PROMPT, params=GREEDY, prefill="")
        known = [*PROMPT, *whole[:9]]
        orphan = router.start("rest", known, params=PENALISED, attempt=2, num_prompt_tokens=len(PROMPT), prefill="")
        await orphan.wait_end()
        await beside.wait_end()
        assert orphan.token_ids == whole[9:]
        assert beside.token_ids == await router.generate("again", PROMPT, params=GREEDY)
        assert (orphan.joined.transport, orphan.joined.num_transfer_pages) == ("", 0)


@async_test
async def test_a_sequence_larger_than_the_pool_ends_with_an_error():
    async with running(service(num_pages=12)) as (address,), MiniRouter(decode=address) as router:
        collected = router.start("r", PROMPT, params=GREEDY)
        assert isinstance(await collected.wait_failure(), OverloadedError)
        assert len(collected.token_ids) == 6
        refused = router.start("q", [1] * 60, params=GREEDY)
        assert (await refused.wait_failure()).reason == "NO_FREE_PAGES"
