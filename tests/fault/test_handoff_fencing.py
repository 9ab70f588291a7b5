"""A ticket that is not for this model, layout, attempt, page or process is refused, and costs no page."""

import asyncio
from typing import Any, Literal

import pytest
from headrace.v1 import types_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    InvalidRequestError,
    LayoutMismatchError,
    TransferCorruptError,
)
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True, stop_token_ids=(96,))
PROMPT = list(range(1, 23))
OTHER = [7, *PROMPT[1:]]
"""As many tokens, the first one another: the same pages in number and size."""


def prefill_service(**settings) -> PrefillService:
    loaded = loaded_fake_model()
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded)


def decode_service(role: Literal["decode", "both"] = "decode", **loaded: Any) -> DecodeService:
    model = loaded_fake_model(**loaded)
    return DecodeService(DecodeSettings(model=".", role=role), loader=lambda _: model)


def change(handoff: types_pb2.Handoff, name: str, value: object) -> None:
    setattr(handoff, name, value)


TAMPERED = [
    (lambda h: change(h, "holder_incarnation", h.holder_incarnation ^ 1), HandoffLostError, "WORKER_RESTARTED"),
    (lambda h: change(h, "attempt", 2), HandoffLostError, "STALE_ATTEMPT"),
    (lambda h: change(h, "model_fingerprint", "beef"), LayoutMismatchError, "MODEL_MISMATCH"),
    (lambda h: change(h.layout, "num_layers", 3), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: change(h.layout.latent, "rope_dim", 2), LayoutMismatchError, "LAYOUT_MISMATCH"),
    (lambda h: change(h.layout, "dtype", types_pb2.CACHE_DTYPE_BFLOAT16), LayoutMismatchError, "LAYOUT_MISMATCH"),
    (lambda h: h.ClearField("transports"), LayoutMismatchError, "NO_COMMON_TRANSPORT"),
    (lambda h: change(h.lease, "lease_id", "lease-999"), HandoffLostError, "LEASE_EXPIRED"),
    (lambda h: change(h, "num_tokens", 21), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: change(h, "first_token_id", 97), InvalidRequestError, "BAD_TOKEN"),
    (lambda h: change(h, "first_token_id", 96), InvalidRequestError, "BAD_HANDOFF"),  # a stop token
    (lambda h: change(h, "request_id", "other"), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: change(h.sampling_state, "seed", 5), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: h.pages.pop(), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: h.checksums.pop(), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: h.ClearField("lease"), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: h.ClearField("tokens_sha256"), InvalidRequestError, "BAD_HANDOFF"),  # of a holder that does not know it
    (lambda h: change(h, "tokens_sha256", h.tokens_sha256[:16]), InvalidRequestError, "BAD_HANDOFF"),
    (lambda h: change(h, "tokens_sha256", hash_tokens(OTHER)), TransferCorruptError, "TOKENS_MISMATCH"),
]


@pytest.mark.parametrize(("tamper", "error", "reason"), TAMPERED, ids=[f"{i}-{t[2]}" for i, t in enumerate(TAMPERED)])
@async_test
async def test_a_ticket_that_is_not_right_is_refused(tamper, error: type[HeadraceError], reason: str):
    async with (
        running(prefill_service(), decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        tamper(handoff)
        with pytest.raises(error) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == reason


@async_test
async def test_a_worker_with_other_pages_refuses_before_a_byte_moves():
    decoder = decode_service(page_size=8)
    async with (
        running(prefill_service(), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        with pytest.raises(LayoutMismatchError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == "LAYOUT_MISMATCH"


@async_test
async def test_a_restarted_holder_at_the_same_address_refuses_old_tickets():
    # Its own loopback address: nobody else is given the port while neither process has it.
    first = prefill_service(listen="127.0.0.2:0")
    async with running(decode_service()) as (decode,):
        async with running(first) as (address,), MiniRouter(prefill=address) as router:
            handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        second = prefill_service(listen=address)
        async with running(second), MiniRouter(prefill=address, decode=decode) as router:
            newer = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
            assert newer.lease.lease_id == handoff.lease.lease_id, "the incarnation alone tells them apart"
            with pytest.raises(HandoffLostError) as raised:
                await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
            assert raised.value.reason == "WORKER_RESTARTED"


@async_test
async def test_a_page_reused_behind_the_lease_is_noticed():
    prefiller = prefill_service()
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        (lease,) = prefiller.leases.leases
        lease.generations = (lease.generations[0] - 1, *lease.generations[1:])
        with pytest.raises(HandoffLostError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == "STALE_PAGE"


@async_test
async def test_the_ticket_of_a_replaced_attempt_is_refused():
    async with (
        running(prefill_service(), decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        first = (await router.prefill("r", PROMPT, params=GREEDY, attempt=1)).handoff
        second = (await router.prefill("r", PROMPT, params=GREEDY, attempt=2)).handoff
        with pytest.raises(HandoffLostError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=first, attempt=1)
        assert raised.value.reason == "LEASE_EXPIRED"
        with pytest.raises(HandoffLostError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=first, attempt=2)
        assert raised.value.reason == "STALE_ATTEMPT"
        collected, _ = await router.start("r", PROMPT, params=GREEDY, handoff=second, attempt=2)
        await collected.wait_end()
        assert len(collected.token_ids) == 7


@async_test
async def test_a_second_start_with_a_higher_attempt_aborts_the_first():
    model = FakeModel()
    async with (
        running(prefill_service(), decode_service(model=model)) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=2)
        first = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        running_first, _ = await router.start("r", PROMPT, params=GREEDY, handoff=first)
        await running_first.wait_tokens(2)
        second = (await router.prefill("r", PROMPT, params=GREEDY, attempt=2)).handoff
        starting_second = asyncio.ensure_future(router.start("r", PROMPT, params=GREEDY, handoff=second, attempt=2))
        await running_first.wait_end()
        model.release()
        running_second, _ = await starting_second
        await running_second.wait_end()
        assert running_first.failure is not None
        assert running_first.failure.reason == "STALE_ATTEMPT"
        assert len(running_second.token_ids) == 7
        with pytest.raises(HeadraceError):
            await router.start("r", PROMPT, params=GREEDY, handoff=first, attempt=1)


FOREIGN = {
    "as it is": lambda h, tokens: None,
    "with a hash that says so": lambda h, tokens: change(h, "tokens_sha256", hash_tokens(tokens)),
    "with no hash": lambda h, tokens: h.ClearField("tokens_sha256"),
}


@pytest.mark.parametrize("other", [OTHER, [*PROMPT[:-1], 7]], ids=["first token", "last token, in a partial page"])
@pytest.mark.parametrize("tamper", FOREIGN.values(), ids=FOREIGN)
@async_test
async def test_no_request_computes_on_pages_that_a_start_passed_off_as_those_of_other_tokens(tamper, other: list[int]):
    """The worker computes prompts too, and would find such pages again in its prefix cache."""
    async with (
        running(prefill_service(), decode_service("both"), decode_service("both")) as (prefill, decode, clean),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniRouter(decode=clean) as clean_router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        tamper(handoff, other)
        produced: list[int] = []
        problem = None
        try:
            collected, _ = await router.start("r", other, params=GREEDY, handoff=handoff)
            await collected.wait_end()
            produced = collected.token_ids
        except HeadraceError as error:
            problem = error
        later = [*other, handoff.first_token_id, *produced, 30, 31, 32]
        expected = await clean_router.generate_colocated("later", later, params=GREEDY)
        assert await router.generate_colocated("later", later, params=GREEDY) == expected
        assert problem is not None
        assert problem.reason in ("TOKENS_MISMATCH", "BAD_HANDOFF")


@async_test
async def test_the_tokens_that_an_earlier_attempt_produced_count_too():
    retry = {"attempt": 2, "num_prompt_tokens": len(PROMPT)}
    async with (
        running(prefill_service(), decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", [*PROMPT, 40, 41, 42], params=GREEDY, **retry)).handoff
        with pytest.raises(TransferCorruptError) as raised:
            await router.start("r", [*PROMPT, 40, 43, 42], params=GREEDY, handoff=handoff, **retry)
        assert raised.value.reason == "TOKENS_MISMATCH"
        collected, _ = await router.start("r", [*PROMPT, 40, 41, 42], params=GREEDY, handoff=handoff, **retry)
        await collected.wait_end()
        assert (collected.failure, len(collected.token_ids)) == (None, 4)
