"""The next turn's prefill takes the answer's pages from the decode worker that made them, or computes them."""

import asyncio

import pytest
from headrace_core import beats
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import UnavailableError
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.transports import TRANSPORTS, memory_kind
from headrace_core.transfer.values import CachedPrefix
from headrace_core.worker.loading import LoadedModel
from headrace_decode.service import DecodeService
from headrace_prefill.events import FetchReady
from headrace_prefill.service import PrefillService

SAMPLED = SamplingParams(temperature=1.1, seed=5, max_tokens=14, ignore_eos=True)
PROMPT = list(range(1, 23))
"""Five full pages of four tokens, and two tokens: with 14 of an answer nine, but for the last token."""
NEXT = [40, 41, 42, 43, 44, 45, 46]
PAGE_BYTES = 128


def loaded(transports, *, num_pages=256) -> LoadedModel:
    return loaded_fake_model(num_pages=num_pages, memory=new_memory(memory_kind(transports)))


def prefill_service(*, transports=("fake",), model: LoadedModel | None = None) -> PrefillService:
    it = model or loaded(transports)
    return PrefillService(PrefillSettings(model="."), loader=lambda _: it, transports=transports)


def decode_service(*, transports=("fake",), num_pages=256, **settings) -> DecodeService:
    it = loaded(transports, num_pages=num_pages)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: it, transports=transports)


def faults_of(holder) -> FakeFaults:
    return POOLS[pool_name(holder.host.incarnation)].faults


def counted(service, name: str, **labels: str) -> float:
    return service.registry.get_sample_value(name, labels) or 0.0


def at(service: DecodeService, address: str, num_tokens: int = 32) -> CachedPrefix:
    return CachedPrefix(address, service.host.incarnation, num_tokens)


@pytest.mark.parametrize("transport", sorted(name for name, it in TRANSPORTS.items() if not it.probe()))
@async_test
async def test_a_second_turn_computes_and_moves_only_what_is_new(transport: str):
    prefiller, decoder = prefill_service(transports=[transport]), decode_service(transports=[transport])
    async with (
        running(prefiller, decoder, decode_service(role="both")) as (prefill, decode, whole),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniRouter(decode=whole) as reference,
    ):
        answer = await router.generate("one", PROMPT, params=SAMPLED)
        assert counted(prefiller, "headrace_step_tokens_total") == 22
        turn = [
            *PROMPT,
            *answer,
            *NEXT,
        ]  # 43 tokens; 35 of the first turn's are cached at the decode worker, 32 in pages
        collected = router.start("two", turn, params=SAMPLED, cached=at(decoder, decode))
        assert await collected.tokens() == await reference.generate("r", turn, params=SAMPLED)
        assert counted(prefiller, "headrace_step_tokens_total") == 22 + 11, "after 32 tokens"
        assert counted(prefiller, "headrace_prefix_fetched_tokens_total") == 12, "it has 20 itself"
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="taken") == 1
        labels = {"transport": transport, "direction": "received"}
        assert counted(prefiller, "headrace_transfer_bytes_total", **labels) == 3 * PAGE_BYTES
        assert collected.prefilled.num_cached_tokens == 32
        assert (collected.joined.num_cached_tokens, collected.joined.num_transfer_pages) == (32, 3)
        third = [*turn, *await collected.tokens(), *NEXT]
        other = prefill_service(transports=[transport])
        async with running(other) as (cold,):
            again = router.start("three", third, params=SAMPLED, prefill=cold, cached=at(decoder, decode, 56))
            assert await again.tokens() == await reference.generate("r", third, params=SAMPLED)
            assert counted(other, "headrace_prefix_fetched_tokens_total") == 56
            assert counted(other, "headrace_step_tokens_total") == 8


def _other_token(message):
    message.token_ids[3] ^= 1


def _other_hash(message):
    message.tokens_sha256 = bytes(32)


def _other_tokens(message):
    message.token_ids[30] ^= 1
    message.tokens_sha256 = hash_tokens(message.token_ids)


def _flip(decoder, proxy):
    faults_of(decoder).has_flipped_byte = True


def _truncate(decoder, proxy):
    faults_of(decoder).is_truncated = True


FAULTS = {
    "tokens that are not under the hash": (lambda d, p: setattr(p, "rewrite_open", _other_token), "TOKENS_MISMATCH"),
    "another hash": (lambda d, p: setattr(p, "rewrite_open", _other_hash), "TOKENS_MISMATCH"),
    "another process": (
        lambda d, p: setattr(p, "rewrite_open", lambda it: setattr(it, "holder_incarnation", 7)),
        "WORKER_RESTARTED",
    ),
    "no word of a process": (
        lambda d, p: setattr(p, "rewrite_open", lambda it: it.ClearField("holder_incarnation")),
        "BAD_REQUEST",
    ),
    "other tokens": (lambda d, p: setattr(p, "rewrite_open", _other_tokens), "TOKENS_MISMATCH"),
    "other model": (
        lambda d, p: setattr(p, "rewrite_open", lambda it: setattr(it, "model_fingerprint", "beef")),
        "MODEL_MISMATCH",
    ),
    "a byte": (_flip, "CHECKSUM"),
    "fewer bytes": (_truncate, "SHORT_READ"),
    "draining": (lambda d, p: d.host.begin_drain(), "DRAINING"),
}


@pytest.mark.parametrize("fault", FAULTS)
@async_test
async def test_what_is_wrong_with_a_cached_prefix_is_computed_and_nobodys_error(fault: str):
    break_it, reason = FAULTS[fault]
    prefiller, first, second = prefill_service(), decode_service(), decode_service()
    async with (
        running(prefiller, first, second, decode_service(role="both")) as (prefill, one, two, whole),
        HoldProxy(one) as proxy,
        MiniRouter(prefill=prefill, decode=one) as earlier,
        MiniRouter(prefill=prefill, decode=two) as router,
        MiniRouter(decode=whole) as reference,
    ):
        answer = await earlier.generate("one", PROMPT, params=SAMPLED)
        break_it(first, proxy)
        turn = [*PROMPT, *answer, *NEXT]
        collected = router.start("two", turn, params=SAMPLED, cached=at(first, proxy.address))
        assert await collected.tokens() == await reference.generate("r", turn, params=SAMPLED)
        assert collected.prefilled.num_cached_tokens == 20, "its own"
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="failed") == 1
        assert counted(prefiller, "headrace_handoff_failures_total", reason=reason) == 1
        await all_free(first)
        again = router.start("three", turn, params=SAMPLED)
        assert await again.tokens() == await collected.tokens(), "nothing wrong is cached"


@pytest.mark.parametrize("has_some", [False, True], ids=["all", "some"])
@async_test
async def test_what_was_evicted_meanwhile_is_computed(has_some: bool):
    """The answer's last page is the first to go."""
    prefiller, decoder, taker = prefill_service(), decode_service(num_pages=14), decode_service()
    async with (
        running(prefiller, decoder, taker, decode_service(role="both")) as (prefill, one, two, whole),
        MiniRouter(prefill=prefill, decode=one) as earlier,
        MiniRouter(prefill=prefill, decode=two) as router,
        MiniRouter(decode=whole) as reference,
    ):
        answer = await earlier.generate("one", PROMPT, params=SAMPLED)
        if has_some:
            await earlier.generate("other", [90] * 12, params=SAMPLED)
        else:
            await earlier.generate("other", [90] * 43, params=SAMPLED)
        turn = [*PROMPT, *answer, *NEXT]
        collected = router.start("two", turn, params=SAMPLED, cached=at(decoder, one))
        assert await collected.tokens() == await reference.generate("r", turn, params=SAMPLED)
        num_fetched = collected.prefilled.num_cached_tokens - 20
        assert num_fetched == counted(prefiller, "headrace_prefix_fetched_tokens_total")
        assert (0 < num_fetched < 12) if has_some else num_fetched == 0
        await all_free(decoder)


@pytest.mark.parametrize("phase", ["asked", "pulling"])
@pytest.mark.parametrize("how", ["killed", "silent"])
@async_test
async def test_a_holder_that_is_lost_meanwhile_costs_the_computing(phase: str, how: str, monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    prefiller, first, second = prefill_service(), decode_service(), decode_service()
    async with (
        running(prefiller, first, second, decode_service(role="both")) as (prefill, one, two, whole),
        MiniRouter(prefill=prefill, decode=one) as earlier,
        MiniRouter(prefill=prefill, decode=two) as router,
        MiniRouter(decode=whole) as reference,
    ):
        answer = await earlier.generate("one", PROMPT, params=SAMPLED)
        turn = [*PROMPT, *answer, *NEXT]
        proxy = HoldProxy(one)
        async with proxy:
            faults = faults_of(first)
            if phase == "asked":
                proxy.gates["admitted"] = asyncio.Event()
            else:
                faults.gate = asyncio.Event()
            collected = router.start("two", turn, params=SAMPLED, cached=at(first, proxy.address))
            await eventually(lambda: "admitted" in proxy.seen, "it is asked")
            if phase == "pulling":
                await faults.entered.wait()
            if how == "silent":
                proxy.is_silent = True
                await collected.wait_tokens(1)
        assert await collected.tokens() == await reference.generate("r", turn, params=SAMPLED)
        assert collected.prefilled.num_cached_tokens == 20
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="failed") == 1
        await all_free(first)


@async_test
async def test_nobody_at_that_address_costs_the_computing():
    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        expected = await router.generate("one", PROMPT, params=SAMPLED)
        nobody = CachedPrefix("127.0.0.1:9", 1, 24)
        assert await router.generate("two", [*PROMPT, 7, 8, 9], params=SAMPLED, cached=nobody)
        assert await router.generate("three", PROMPT, params=SAMPLED, cached=nobody) == expected, (
            "it has as much itself"
        )
        assert counted(prefiller, "headrace_handoff_failures_total", reason="HOLDER_LOST") == 1


@pytest.mark.parametrize("by", ["cancel", "taker"])
@async_test
async def test_a_sequence_that_ends_while_its_prefix_is_fetched_sets_its_pages_aside_until_nothing_can_land(by: str):
    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        answer = await router.generate("one", PROMPT, params=SAMPLED)
        faults = faults_of(decoder)
        faults.gate, faults.is_cancel_ignored = asyncio.Event(), True
        faults.entered.clear()
        turn = [*PROMPT, *answer, *NEXT]
        collected = router.start("two", turn, params=SAMPLED, cached=at(decoder, decode))
        await faults.entered.wait()
        if by == "cancel":
            router.cancel(collected)
        else:
            await router.close_session()
        await eventually(lambda: not prefiller.leases.leases, "its lease is over")
        counts = await inspect(prefiller)
        assert (counts[PageState.QUARANTINED], counts[PageState.OWNED]) == (6, 0)
        faults.gate.set()
        await all_free(prefiller)
        await all_free(decoder)


@async_test
async def test_others_go_on_while_a_prefix_is_fetched():
    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        answer = await router.generate("one", PROMPT, params=SAMPLED)
        faults = faults_of(decoder)
        faults.gate = asyncio.Event()
        fetching = router.start("two", [*PROMPT, *answer, *NEXT], params=SAMPLED, cached=at(decoder, decode))
        await faults.entered.wait()
        assert len(await router.generate("other", NEXT, params=SAMPLED)) == 14
        assert fetching.prefilled is None
        faults.gate.set()
        assert len(await fetching.tokens()) == 14


@async_test
async def test_a_prefill_worker_gives_nobody_what_it_has_cached():
    async with running(prefill_service()) as (prefill,), MiniTaker(prefill) as taker:
        asked = taker.order("r", PROMPT, params=SAMPLED, change=lambda it: setattr(it, "holder_incarnation", 7))
        assert (await asked.refused()).reason == "BAD_REQUEST"


@async_test
async def test_what_no_sequence_of_a_worker_can_be_is_not_kept_for_who_asks_for_it():
    """An order's tokens are kept as long as its call stands: a message of 8 MiB has millions."""
    decoder = decode_service()
    async with running(decoder) as (decode,), MiniTaker(decode) as taker:
        most, me = taker.info.max_context_tokens, taker.info.incarnation
        asked = taker.order("r", [1] * (most + 1), params=SAMPLED, holder_incarnation=me)
        assert (await asked.refused()).reason == "PROMPT_TOO_LONG"
        assert (await taker.order("s", [1] * most, params=SAMPLED, holder_incarnation=me).wait_admitted()).lease_key


@async_test
async def test_a_fetch_that_is_cancelled_before_it_began_gives_its_pages_back():
    prefiller, decoder = prefill_service(), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        answer = await router.generate("one", PROMPT, params=SAMPLED)
        fetch = prefiller.fetcher.fetch

        def fetch_and_cancel(ready, order):
            fetch(ready, order)
            for lease in prefiller.leases.leases:
                prefiller.leases.abort(lease, UnavailableError("DRAINING", "told by the test"))

        prefiller.fetcher.fetch = fetch_and_cancel
        collected = router.start("two", [*PROMPT, *answer, *NEXT], params=SAMPLED, cached=at(decoder, decode))
        assert (await collected.wait_failure()).reason == "DRAINING"
        await all_free(prefiller)
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="failed") == 0


@async_test
async def test_a_sequence_that_ends_before_anybody_heard_of_its_pages_gives_them_back():
    prefiller, decoder = prefill_service(), decode_service()
    on_news = prefiller._on_news

    def hear_late(news):
        if any(isinstance(event, FetchReady) for event in news.events):
            prefiller._holder.abort_all(UnavailableError("DRAINING", "told by the test"))
        on_news(news)

    prefiller._on_news = hear_late
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        answer = await router.generate("one", PROMPT, params=SAMPLED)
        collected = router.start("two", [*PROMPT, *answer, *NEXT], params=SAMPLED, cached=at(decoder, decode))
        assert (await collected.wait_failure()).reason == "DRAINING"
        await all_free(prefiller)
