"""A sequence whose numbers or whose computing go wrong fails alone, by name; those in its steps have their tokens."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from headrace.v1 import decode_service_pb2, types_pb2
from headrace_core.batch.step import Chunk
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HeadraceError, InvalidRequestError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import Collected, MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

PARAMS = SamplingParams(temperature=1.1, top_p=0.9, seed=5, max_tokens=24, ignore_eos=True)
PROMPTS = {f"r{i}": [(7 * i + j) % 90 + 1 for j in range(9 + 2 * i)] for i in range(8)}
BAD_PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
LAST_GOOD = 4
"""Tokens that a sequence that fails in decode has before."""


class Spoiler:
    """Spoils what `bad` requests compute, from a position on; knows how many others were in their steps."""

    def __init__(self, model: FakeModel, kind: str, *, bad: Sequence[str] = ("bad",), start: int = 0) -> None:
        self.num_beside: list[int] = []
        self.is_on = True
        self._kind, self._bad, self._start = kind, bad, start
        model.raises = self.raises
        model.is_damaged = self.is_damaged

    def is_bad(self, chunk: Chunk) -> bool:
        return self.is_on and chunk.request_id in self._bad and chunk.start >= self._start

    def raises(self, chunks: Sequence[Chunk]) -> Exception | None:
        num_bad = sum(self.is_bad(chunk) for chunk in chunks)
        if not num_bad:
            return None
        self.num_beside.append(len(chunks) - num_bad)
        has_partner = any(chunk.request_id == "r3" for chunk in chunks)
        is_due = {"nan": False, "raise": True, "raise together": has_partner}[self._kind]
        return RuntimeError("broken") if is_due else None

    def is_damaged(self, chunk: Chunk) -> bool:
        return self._kind == "nan" and self.is_bad(chunk)


def prefill_service(model: FakeModel) -> PrefillService:
    loaded = loaded_fake_model(model=model, num_pages=256)
    return PrefillService(PrefillSettings(model=".", max_step_tokens=512), loader=lambda _: loaded)


def decode_service(model: FakeModel, **settings) -> DecodeService:
    loaded = loaded_fake_model(model=model, num_pages=256)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded)


async def alone(prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return each request's tokens from a worker that computes one at a time."""
    worker = decode_service(FakeModel(), role="both", max_step_sequences=1)
    async with running(worker) as (address,), MiniRouter(decode=address) as router:
        return {name: await router.generate_colocated(name, p, params=PARAMS) for name, p in prompts.items()}


async def together(
    router: MiniRouter, prompts: dict[str, list[int]], model: FakeModel, *conditions: Callable[[], bool]
) -> dict[str, list[int] | BaseException]:
    """Generate for all prompts; the model's first step, of the first of them, waits for a condition, and so on."""
    model.hold()
    asked: list[asyncio.Future[list[int]]] = []
    for name, prompt in prompts.items():
        asked.append(asyncio.ensure_future(router.generate(name, prompt, params=PARAMS)))
        if len(asked) == 1:
            await asyncio.to_thread(model.wait_held)
    for condition in conditions:
        await eventually(condition, "all are there")
        model.hold(after=1)
    model.release()
    return dict(zip(prompts, await asyncio.gather(*asked, return_exceptions=True), strict=True))


def check(found: dict[str, list[int] | BaseException], expected: dict[str, list[int]], kind: str) -> None:
    bad = found.pop("bad")
    assert found == {name: expected[name] for name in found}
    if kind == "raise together":
        assert bad == expected["bad"]
        return
    assert isinstance(bad, HeadraceError)
    assert bad.reason == {"nan": "BAD_LOGITS", "raise": "ENGINE_FAILED"}[kind]
    assert str(bad).startswith("request bad: ")
    assert "checkpoint may be damaged" in str(bad)


@pytest.mark.parametrize("kind", ["nan", "raise", "raise together"])
@async_test
async def test_a_sequence_that_fails_in_decode_takes_nobody_with_it(kind: str):
    prompts = {**PROMPTS, "bad": BAD_PROMPT}
    model = FakeModel()
    spoiler = Spoiler(model, kind, start=len(BAD_PROMPT) + LAST_GOOD)
    decoder = decode_service(model, role="decode")
    async with (
        running(prefill_service(FakeModel()), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        sequences = decoder._sequences
        found = await together(
            router,
            prompts,
            model,
            lambda: len(sequences) == len(prompts),
            lambda: all(sequence.moved for sequence in sequences.values()),
        )
        assert max(spoiler.num_beside) == len(PROMPTS), "it was in a step with all the others"
        check(found, await alone(prompts), kind)
        spoiler.is_on = False
        again = await router.generate("bad", BAD_PROMPT, params=PARAMS, attempt=2)
        assert again == (await alone({"bad": BAD_PROMPT}))["bad"]


@pytest.mark.parametrize("kind", ["nan", "raise", "raise together"])
@async_test
async def test_a_prompt_that_fails_takes_nobody_with_it(kind: str):
    prompts = {**PROMPTS, "bad": BAD_PROMPT}
    model = FakeModel()
    spoiler = Spoiler(model, kind)
    prefiller = prefill_service(model)
    async with (
        running(prefiller, decode_service(FakeModel(), role="decode")) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        found = await together(router, prompts, model, lambda: len(prefiller.leases.leases) == len(prompts))
        assert max(spoiler.num_beside) == len(PROMPTS) - 1, "it was in a step with all the others but the first"
        check(found, await alone(prompts), kind)
        spoiler.is_on = False
        again = await router.generate("bad", BAD_PROMPT, params=PARAMS, attempt=2)
        assert again == (await alone({"bad": BAD_PROMPT}))["bad"], "nothing of what was spoilt is used again"


@pytest.mark.parametrize("kind", ["nan", "raise"])
@async_test
async def test_where_all_fail_each_is_told_its_own_and_the_worker_goes_on(kind: str):
    model = FakeModel()
    spoiler = Spoiler(model, kind, bad=list(PROMPTS))
    prefiller = prefill_service(model)
    async with (
        running(prefiller, decode_service(FakeModel(), role="decode")) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        found = await together(router, PROMPTS, model, lambda: len(prefiller.leases.leases) == len(PROMPTS))
        for name, error in found.items():
            assert isinstance(error, HeadraceError)
            assert str(error).startswith(f"request {name}: ")
        spoiler.is_on = False
        assert await router.generate("r1", PROMPTS["r1"], params=PARAMS, attempt=2) == (await alone(PROMPTS))["r1"]


HOSTILE = {
    "repetition_penalty": types_pb2.SamplingParams(temperature=0.9, repetition_penalty=1e-38, seed=1),
    "whole vocabulary": types_pb2.SamplingParams(min_tokens=3, max_tokens=3, stop_token_ids=range(97), seed=1),
    "stop_token_ids": types_pb2.SamplingParams(stop_token_ids=[1] * 1_900_000, seed=1),
    "logit_bias": types_pb2.SamplingParams(logit_bias=[types_pb2.LogitBias(token_id=1, bias=1)] * 2000, seed=1),
}


@pytest.mark.parametrize("named", HOSTILE)
@async_test
async def test_parameters_without_an_answer_or_a_bound_are_refused_by_every_worker(named: str):
    """A router that checks nothing can't make a worker compute them."""
    async with (
        running(prefill_service(FakeModel()), decode_service(FakeModel(), role="both")) as (prefill, decode),
        MiniRouter(decode=decode) as router,
        MiniTaker(prefill) as taker,
    ):
        number = {"sequence_number": 1, "attempt": 1, "request_id": "r", "timeout_ms": 60_000}
        prompt = {"token_ids": BAD_PROMPT, "num_prompt_tokens": len(BAD_PROMPT), "sampling": HOSTILE[named]}
        collected = router.outputs[1, 1] = Collected(1, 1, len(BAD_PROMPT))
        start = decode_service_pb2.StartSequence(**number, **prompt)
        router.send(decode_service_pb2.SessionRequest(start=start))

        def change(message):
            message.sampling.CopyFrom(HOSTILE[named])

        ordered = taker.order("r", BAD_PROMPT, params=PARAMS, change=change)
        for error in (await collected.wait_failure(), await ordered.refused()):
            assert isinstance(error, InvalidRequestError)
            assert error.reason == "BAD_SAMPLING"
            assert named in str(error)
