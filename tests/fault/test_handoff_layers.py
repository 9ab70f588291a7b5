"""Pages flow while the later layers of their own step are computed, and what goes wrong in between is never a token."""

import asyncio
import threading

import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import all_free, inspect, running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_core.transfer.taker import MOST_PULLS
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))
PREFILL = decode_service_pb2.FAILURE_SIDE_PREFILL
LAYERS = 8


class Gate:
    """Stops a step of a model, by its number, when so many layers are done, until it is opened."""

    def __init__(self, model: FakeModel, num_layers: int, *, step: int = 1) -> None:
        self._model = model
        self._place = step, num_layers
        self._open = threading.Event()
        model.between_layers = self._pass

    def open(self) -> None:
        self._open.set()

    def _pass(self, num_layers: int) -> None:
        if (self._model.num_steps, num_layers) == self._place:
            assert self._open.wait(WAIT_S)


def prefill_service(model: FakeModel, *, transport: str = "fake", least_run_bytes: int = 1) -> PrefillService:
    loaded = loaded_fake_model(model=model, num_pages=256)
    settings = PrefillSettings(model=".", max_step_tokens=512)
    return PrefillService(settings, loader=lambda _: loaded, transports=[transport], least_run_bytes=least_run_bytes)


def decode_service(*, transport: str = "fake", **settings) -> DecodeService:
    loaded = loaded_fake_model(model=FakeModel(num_layers=LAYERS), num_pages=256)
    return DecodeService(DecodeSettings(model=".", **settings), loader=lambda _: loaded, transports=[transport])


def faults_of(prefiller: PrefillService) -> FakeFaults:
    return POOLS[pool_name(prefiller.host.incarnation)].faults


def layers(faults: FakeFaults) -> list[tuple[int, int]]:
    """Return (first layer, number of layers) of each run that was pulled."""
    return [(run.first_layer, run.num_layers) for _, run in faults.pulled]


async def reference(prompt: list[int]) -> list[int]:
    async with running(decode_service(role="both")) as (address,), MiniRouter(decode=address) as router:
        return await router.generate("r", prompt, params=GREEDY)


@async_test
async def test_a_prompt_of_one_chunk_is_taken_while_its_later_layers_are_computed():
    model = FakeModel(num_layers=LAYERS)
    gate = Gate(model, 7)
    prefiller, decoder = prefill_service(model), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        collected = router.start("r", PROMPT, params=GREEDY)
        faults = faults_of(prefiller)
        await eventually(lambda: layers(faults) == [(0, 4), (4, 2), (6, 1)], "seven layers are asked for")
        await eventually(lambda: decoder._taker.pulls._num_free == MOST_PULLS, "they are there and verified")
        assert (model.num_steps, collected.prefilled) == (1, None)
        gate.open()
        assert await collected.tokens() == await reference(PROMPT)
        assert layers(faults) == [(0, 4), (4, 2), (6, 1), (7, 1)]
        assert {(run.first_page, run.num_pages) for _, run in faults.pulled} == {(0, 6)}
        assert collected.joined.num_transfer_pages == 6
        of_a_layer = 6 * decoder.host.model.layout.page_layer_bytes
        assert (collected.joined.hidden_transfer_bytes, collected.joined.transfer_bytes) == (
            7 * of_a_layer,
            8 * of_a_layer,
        )
        assert collected.joined.hidden_transfer_us > 0
        labels = {"transport": "fake"}
        hidden = decoder.registry.get_sample_value("headrace_hidden_transfer_bytes_total", labels)
        assert hidden == 7 * of_a_layer
        assert decoder.registry.get_sample_value("headrace_hidden_transfer_seconds_count", labels) == 1


@pytest.mark.parametrize("transport", ["fake", "grpc"])
@async_test
async def test_prompts_in_one_step_arrive_in_layers_each_as_it_was_computed(transport: str):
    prompts = [PROMPT[: 22 - 5 * (i % 3)] for i in range(6)]
    async with (
        running(
            prefill_service(FakeModel(num_layers=LAYERS), transport=transport), decode_service(transport=transport)
        ) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        found = await asyncio.gather(*(router.generate(f"r{i}", p, params=GREEDY) for i, p in enumerate(prompts)))
    assert found == [await reference(prompt) for prompt in prompts]


@async_test
async def test_a_small_prompt_is_one_run():
    prefiller = prefill_service(FakeModel(num_layers=LAYERS), least_run_bytes=1 << 20)
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        assert len(await router.generate("r", PROMPT, params=GREEDY)) == 8
        assert layers(faults_of(prefiller)) == [(0, LAYERS)]


@async_test
async def test_a_prompt_that_turns_out_not_finite_is_not_accepted_though_its_first_layers_were_taken():
    model = FakeModel(num_layers=LAYERS)
    gate = Gate(model, 7, step=2)
    model.is_damaged = lambda chunk: chunk.request_id == "bad"
    prefiller, decoder = prefill_service(model), decode_service()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold()
        good = router.start("good", [9, *PROMPT], params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        bad = router.start("bad", PROMPT, params=GREEDY)
        beside = router.start("beside", [8, *PROMPT], params=GREEDY)
        await eventually(lambda: len(prefiller.leases.leases) == 3, "all are there")
        faults = faults_of(prefiller)
        model.release()
        await eventually(lambda: layers(faults).count((6, 1)) == 3, "seven layers of each are asked for")
        await eventually(lambda: decoder._taker.pulls._num_free == MOST_PULLS, "they are there and verified")
        gate.open()
        assert ((await bad.wait_failure()).reason, bad.side) == ("BAD_LOGITS", PREFILL)
        assert (bad.token_ids, bad.joined) == ([], None)
        assert await good.tokens() == await reference([9, *PROMPT])
        assert await beside.tokens() == await reference([8, *PROMPT]), "it failed alone"
        assert model.num_steps == 2, "nothing was computed twice"
        await all_free(decoder)
        model.is_damaged = lambda chunk: False
        again = router.start("bad", PROMPT, params=GREEDY, attempt=2)
        assert await again.tokens() == await reference(PROMPT)
        assert again.prefilled.num_cached_tokens == 0


@async_test
async def test_rule_3_a_step_that_raised_after_it_sealed_is_not_read_when_it_is_written_again():
    model = FakeModel(num_layers=LAYERS)
    prefiller, decoder = prefill_service(model), decode_service()
    culprits = {"bad"}

    def raises(chunks):
        return RuntimeError("broken") if any(chunk.request_id in culprits for chunk in chunks) else None

    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold()
        first = router.start("first", [9] * 5, params=GREEDY)
        await asyncio.to_thread(model.wait_held)
        sequences = [router.start("bad", PROMPT, params=GREEDY), router.start("beside", [8, *PROMPT], params=GREEDY)]
        await eventually(lambda: len(prefiller.leases.leases) == 3, "all are there")
        faults = faults_of(prefiller)
        faults.gate = asyncio.Event()
        model.raises = raises
        model.release()
        failures = [await collected.wait_failure() for collected in sequences]
        assert [error.reason for error in failures] == ["ENGINE_FAILED", "STALE_PAGE"]
        assert [collected.side for collected in sequences] == [PREFILL, PREFILL]
        assert all(not collected.token_ids for collected in sequences)
        faults.gate.set()
        assert await first.tokens() == await reference([9] * 5)
        again = router.start("beside", [8, *PROMPT], params=GREEDY, attempt=2)
        assert await again.tokens() == await reference([8, *PROMPT])
        assert again.prefilled.num_cached_tokens == 20, "what was computed alone is good"
        await all_free(decoder)
        await inspect(prefiller)
