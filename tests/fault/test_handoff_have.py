"""Pages that the taker has are neither moved nor waited for, and nobody writes to them."""

import asyncio

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker, Ordered
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))
"""Five full pages of four tokens, and two tokens."""
PAGE_BYTES = 128


def prefill_service(*, transports=("fake",), **settings) -> PrefillService:
    loaded = loaded_fake_model(num_pages=256)
    settings = {"max_step_tokens": 8, **settings}
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def decode_service(*, transports=("fake",), **settings) -> DecodeService:
    loaded = loaded_fake_model(num_pages=256)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded, transports=transports)


def faults_of(prefiller: PrefillService) -> FakeFaults:
    return POOLS[pool_name(prefiller.host.incarnation)].faults


@pytest.mark.parametrize("transport", ["fake", "grpc"])
@async_test
async def test_a_second_prompt_of_the_same_beginning_moves_what_is_its_own(transport: str):
    decoder = decode_service(transports=[transport])
    async with (
        running(prefill_service(transports=[transport]), decoder, decode_service(role="both")) as (
            prefill,
            decode,
            whole,
        ),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniRouter(decode=whole) as reference,
    ):
        for name, prompt, num_have, num_moved in (
            ("cold", PROMPT, 0, 6),
            ("same", PROMPT, 5, 1),
            ("longer", [*PROMPT, *range(30, 39)], 5, 3),
            ("other from the middle on", [*PROMPT[:11], *range(50, 60)], 2, 4),
            ("other", PROMPT[::-1], 0, 6),
        ):
            collected = router.start(name.replace(" ", "_"), prompt, params=GREEDY)
            assert await collected.tokens() == await reference.generate("r", prompt, params=GREEDY)
            joined = collected.joined
            assert joined is not None
            assert (joined.num_cached_tokens, joined.num_transfer_pages) == (4 * num_have, num_moved), name
            assert joined.transfer_bytes == num_moved * PAGE_BYTES
        labels = {"transport": transport, "direction": "received"}
        assert decoder.registry.get_sample_value("headrace_transfer_bytes_total", labels) == 20 * PAGE_BYTES
        assert decoder.registry.get_sample_value("headrace_prefix_cache_hit_tokens_total") == 48


@async_test
async def test_where_the_taker_has_every_page_none_moves():
    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        first = await router.generate("a", PROMPT[:20], params=GREEDY)
        faults_of(prefiller).pulled.clear()
        again = router.start("b", PROMPT[:20], params=GREEDY)
        assert await again.tokens() == first
        assert not faults_of(prefiller).pulled
        joined = again.joined
        assert joined is not None
        assert (joined.num_cached_tokens, joined.num_transfer_pages, joined.transport) == (20, 0, "")
        assert decoder.registry.get_sample_value("headrace_transfer_seconds_count", {"transport": "fake"}) == 1


@async_test
async def test_a_holder_that_sends_what_is_here_is_refused_and_nothing_is_written():
    """It does not hear what the taker has; its pages hold the same, but might not."""
    prefiller = prefill_service()
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        first = await router.generate("a", PROMPT, params=GREEDY)
        faults_of(prefiller).pulled.clear()
        proxy.rewrite_open = lambda message: message.ClearField("num_have_tokens")
        deaf = router.start("b", PROMPT, params=GREEDY)
        assert (await deaf.wait_failure()).reason == "PROTOCOL"
        assert deaf.side == decode_service_pb2.FAILURE_SIDE_PREFILL
        assert not faults_of(prefiller).pulled
        proxy.rewrite_open = lambda message: None
        assert await router.generate("c", PROMPT, params=GREEDY) == first


@async_test
async def test_pages_that_a_sequence_shares_stay_while_its_own_are_under_transfer_and_are_let_go_with_it():
    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        await router.generate("a", PROMPT, params=GREEDY)
        faults = faults_of(prefiller)
        faults.gate, faults.is_cancel_ignored = asyncio.Event(), True
        faults.entered.clear()
        cancelled = router.start("b", [*PROMPT, *range(30, 39)], params=GREEDY)
        await faults.entered.wait()
        assert decoder.host.board.report.num_free_pages == 256 - 8, "five are shared"
        router.cancel(cancelled)
        await eventually(lambda: not decoder.num_sequences, "it is over")
        assert (await inspect(decoder))[PageState.QUARANTINED] == 3
        assert decoder.host.board.report.num_free_pages == 256 - 8
        faults.gate.set()
        await all_free(decoder)


@pytest.mark.parametrize("num_have", [3, 21, 24, 1 << 31])
@async_test
async def test_pages_that_nobody_can_have_are_refused(num_have: int):
    async with running(prefill_service()) as (prefill,), MiniTaker(prefill) as taker:
        ordered = taker.order("r", PROMPT, params=GREEDY, change=lambda it: setattr(it, "num_have_tokens", num_have))
        assert (await ordered.refused()).reason == "BAD_HANDOFF"


@async_test
async def test_a_holder_seals_neither_cached_nor_computed_pages_that_the_taker_has():
    async with running(prefill_service()) as (prefill,), MiniTaker(prefill) as taker:
        for name, num_have, expected in (
            ("a", 12, [3, 4, 5]),
            ("b", 16, [4, 5]),
            ("c", 20, [5]),
            ("d", 8, [2, 3, 4, 5]),
        ):
            ordered = taker.order(
                name, PROMPT, params=GREEDY, change=lambda it, n=num_have: setattr(it, "num_have_tokens", n)
            )
            await ordered.wait_first()
            await ordered.wait(lambda o=ordered, pages=expected: sealed(o) == pages)
            await ordered.confirm()
            assert sealed(ordered) == expected


def sealed(ordered: Ordered) -> list[int]:
    return [run.first_page + i for run in ordered.runs for i in range(run.num_pages)]
