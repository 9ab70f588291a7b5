"""A ticket that is not for this model, layout, attempt, page or process is refused, and costs no page."""

import asyncio
import dataclasses

import pytest
from headrace.v1 import types_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError, LayoutMismatchError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True, stop_token_ids=(96,))
PROMPT = list(range(1, 23))


def prefill_service(**settings) -> PrefillService:
    loaded = loaded_fake_model()
    return PrefillService(PrefillSettings(model=".", lease_s=0.3, **settings), loader=lambda _: loaded)


def decode_service(**loaded) -> DecodeService:
    model = loaded_fake_model(**loaded)
    return DecodeService(DecodeSettings(model="."), loader=lambda _: model)


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
    first = prefill_service()
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
    slow = dataclasses.replace(GREEDY, max_tokens=400)
    async with (
        running(prefill_service(), decode_service(num_pages=256)) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        first = (await router.prefill("r", PROMPT, params=slow)).handoff
        running_first, _ = await router.start("r", PROMPT, params=slow, handoff=first)
        await running_first.wait_tokens(2)
        second = (await router.prefill("r", PROMPT, params=GREEDY, attempt=2)).handoff
        running_second, _ = await router.start("r", PROMPT, params=GREEDY, handoff=second, attempt=2)
        await asyncio.gather(running_first.wait_end(), running_second.wait_end())
        assert running_first.failure is not None
        assert running_first.failure.reason == "STALE_ATTEMPT"
        assert len(running_second.token_ids) == 7
        with pytest.raises(HeadraceError):
            await router.start("r", PROMPT, params=GREEDY, handoff=first, attempt=1)
