"""What the event loop and the engine's thread do at once: the one ends a sequence of which the other has news."""

import asyncio
import queue

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import UnavailableError
from headrace_core.kv.page_pool import PageState
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.hold_proxy import HoldProxy
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, pool_name
from headrace_core.wire import encode_sampling
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

PROMPT = list(range(1, 23))


def num_owned(decoder: DecodeService) -> int:
    """Return the pages that sequences have, by the engine's thread; the event loop hears nothing meanwhile."""
    counted: queue.SimpleQueue[int] = queue.SimpleQueue()
    decoder.host.engine.submit(lambda scheduler: counted.put(scheduler.load().page_counts[PageState.OWNED]))
    return counted.get(timeout=WAIT_S)


@pytest.mark.parametrize("by", ["cancel", "session"])
@async_test
async def test_pages_of_a_sequence_that_ends_while_they_are_announced_are_freed(by: str):
    """`running` looks at every page: none is left set aside for a transfer that never began."""
    loaded = loaded_fake_model()
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded)
    async with running(decoder):
        session = decoder.open_session(7)
        start = decode_service_pb2.StartSequence(
            sequence_number=1,
            attempt=1,
            request_id="r",
            timeout_ms=60_000,
            token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT),
            sampling=encode_sampling(SamplingParams(seed=1)),
            prefill_address="127.0.0.1:1",
        )
        decoder.start_sequence(session, start)
        while not num_owned(decoder):
            pass
        if by == "cancel":
            decoder.cancel_sequence(session, 1, attempt=1)
        decoder.close_session(session, UnavailableError("SESSION_CLOSED", "over"))


@async_test
async def test_a_transfer_that_failed_is_drained_however_the_sequence_ends_meanwhile():
    """Its wait has failed, its bytes are still under way: a cancel in that moment must not let its pages go."""
    loaded, decoding = loaded_fake_model(), loaded_fake_model()
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded, transports=["fake"])
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: decoding, transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = POOLS[pool_name(prefiller.host.incarnation)].faults
        faults.gate, faults.is_cancel_ignored, faults.is_given_up = asyncio.Event(), True, True
        collected = router.start("r", PROMPT, params=SamplingParams(seed=1))
        await faults.entered.wait()
        router.cancel(collected)
        await eventually(lambda: not decoder.num_sequences, "the sequence is gone")
        await eventually(lambda: not prefiller.leases.leases, "the holder has heard of it")
        assert faults.num_moving
        for _ in range(20):  # as many turns of the loop as an end takes that waits for nobody, and more
            await inspect(decoder)
        assert (await inspect(decoder))[PageState.QUARANTINED] == 6
        faults.gate.set()
        await all_free(decoder)


@async_test
async def test_a_first_token_that_is_the_last_does_not_end_the_reading_of_pages_before_it_is_heard():
    """Bytes and words are on different connections: a pull may end before the token comes that makes it needless."""
    model, decoding = FakeModel(), loaded_fake_model()
    loaded = loaded_fake_model(model=model)
    model.hold(after=1)
    prefiller = PrefillService(
        PrefillSettings(model=".", max_step_tokens=8), loader=lambda _: loaded, transports=["fake"]
    )
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: decoding, transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        faults = POOLS[pool_name(prefiller.host.incarnation)].faults
        faults.gate, proxy.gates["last"] = asyncio.Event(), asyncio.Event()
        collected = router.start("r", PROMPT, params=SamplingParams(seed=1, max_tokens=1))
        await faults.entered.wait()
        model.release()  # not before: pages may be sealed so late that they are told of behind the first token
        await eventually(lambda: "last" in proxy.seen, "it has its first token, and the taker is not told")
        faults.gate.set()
        await eventually(lambda: not faults.num_moving, "the pages were read")
        for _ in range(20):
            await inspect(decoder)
        proxy.gates["last"].set()
        assert len(await collected.tokens()) == 1


@async_test
async def test_a_taking_that_failed_is_drained_however_its_sequence_ends_meanwhile():
    loaded, decoding = loaded_fake_model(), loaded_fake_model()
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded, transports=["fake"])
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: decoding, transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = POOLS[pool_name(prefiller.host.incarnation)].faults
        faults.gate, faults.is_cancel_ignored = asyncio.Event(), True
        collected = router.start("r", PROMPT, params=SamplingParams(seed=1))
        await faults.entered.wait()
        for lease in prefiller.leases.leases:
            prefiller.leases.abort(lease, UnavailableError("DRAINING", "made to go away"))
        for _ in range(20):  # the taker hears that, and waits for its transfer
            await inspect(decoder)
        assert decoder.num_sequences
        router.cancel(collected)
        await eventually(lambda: not decoder.num_sequences, "the sequence is gone")
        for _ in range(20):
            await inspect(decoder)
        assert (await inspect(decoder))[PageState.QUARANTINED] == 6
        faults.gate.set()
        await all_free(decoder)
