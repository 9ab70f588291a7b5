"""The way back, and the memory that is read on it: it stays as long as somebody reads, and is no more than is read."""

from dataclasses import replace

from headrace_core.config import DecodeSettings
from headrace_core.model.kv_cache import KvCache
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.handoff_parts import StoppedCopy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import running
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.transports import memory_kind
from headrace_decode.service import DecodeService

from tests.fault.test_handoff_way_back import (
    NEXT,
    PROMPT,
    SAMPLED,
    at,
    counted,
    decode_service,
    loaded,
    prefill_service,
)


@async_test
async def test_what_is_read_out_of_shared_memory_is_not_evicted_before_it_was_read():
    """Nobody asks the holder for a page: it is the call that keeps it."""
    model = loaded(("shm",))
    copying = StoppedCopy(model.cache)
    prefiller = prefill_service(transports=["shm"], model=model)
    decoder, taker = decode_service(transports=["shm"], num_pages=14), decode_service(transports=["shm"])
    async with (
        running(prefiller, decoder, taker, decode_service(role="both")) as (prefill, one, two, whole),
        MiniRouter(prefill=prefill, decode=one) as earlier,
        MiniRouter(prefill=prefill, decode=two) as router,
        MiniRouter(decode=one) as local,
        MiniRouter(decode=whole) as reference,
    ):
        answer = await earlier.generate("one", PROMPT, params=SAMPLED)
        turn = [*PROMPT, *answer, *NEXT]
        collected = router.start("two", turn, params=SAMPLED, cached=at(decoder, one))
        await copying.reached()
        assert decoder.host.board.report.num_free_pages == 6, "eight of the answer's are kept"
        other = local.start("other", [90] * 40, params=SAMPLED)
        await eventually(lambda: decoder.host.board.report.num_waiting == 1, "it wants more than are free")
        copying.go_on()
        assert await collected.tokens() == await reference.generate("r", turn, params=SAMPLED)
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="taken") == 1
        assert len(await other.tokens()) == 14


@async_test
async def test_a_holder_that_goes_away_in_mid_copy_lets_its_shared_memory_go_and_costs_the_computing():
    model = loaded(("shm",))
    copying = StoppedCopy(model.cache)
    prefiller, decoder, taker = (
        prefill_service(transports=["shm"], model=model),
        decode_service(transports=["shm"]),
        decode_service(transports=["shm"]),
    )
    async with (
        running(prefiller, taker, decode_service(role="both")) as (prefill, two, whole),
        MiniRouter(prefill=prefill, decode=two) as router,
        MiniRouter(decode=whole) as reference,
    ):
        one = await decoder.start()
        async with MiniRouter(prefill=prefill, decode=one) as earlier:
            answer = await earlier.generate("one", PROMPT, params=SAMPLED)
        turn = [*PROMPT, *answer, *NEXT]
        collected = router.start("two", turn, params=SAMPLED, cached=at(decoder, one))
        await copying.reached()
        shm = prefiller.fetcher._taker.transports["shm"]
        assert shm.endpoints == [one]
        await decoder.stop()
        (end,) = decoder.prefixes.ends
        assert end.server.num_connections == 0
        copying.go_on()
        assert await collected.tokens() == await reference.generate("r", turn, params=SAMPLED)
        assert collected.prefilled.num_cached_tokens == 20, "its own"
        assert counted(prefiller, "headrace_prefix_fetches_total", outcome="failed") == 1
        await eventually(lambda: shm.endpoints == [], "the mapping is gone")


@async_test
async def test_of_a_pool_on_a_device_only_what_is_asked_for_comes_to_the_host():
    memory = new_memory(memory_kind(("shm",)))
    assert memory is not None
    model = loaded(("fake",))
    cache = KvCache(model.layout, model.num_pages, has_host_copy=True, allocate=memory.allocate)
    on_device = replace(model, cache=cache, memory=memory)
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: on_device, transports=["fake"])
    async with (
        running(prefill_service(), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniTaker(decode) as taker,
    ):
        answer = await router.generate("one", PROMPT, params=SAMPLED)
        arrived = on_host(cache)
        assert len(arrived) == 6
        order = taker.order(
            "two", [*PROMPT, *answer], params=SAMPLED, num_have_tokens=20, holder_incarnation=decoder.host.incarnation
        )
        runs = await order.wait_all()
        asked = {page_id for run in runs for page_id in run.page_ids}
        assert len(asked) == 3
        assert on_host(cache) == arrived | asked, "one of them arrived, and was filled here"


def on_host(cache: KvCache) -> set[int]:
    """Return the pages that take memory there: it was zero at first."""
    return {page_id for page_id in range(cache.num_pages) if any(cache.page_bytes(0, page_id))}
