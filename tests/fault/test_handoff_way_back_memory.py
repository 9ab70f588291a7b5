"""The way back, and the memory that is read on it: shared memory stays as long as somebody reads it."""

from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.handoff_parts import StoppedCopy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running

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
