"""Real prefill and decode services over real gRPC, with the fake model: handing off changes no token."""

import pytest
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, seed=77, max_tokens=24, ignore_eos=True)
PROMPT = [(7 * i) % 90 + 1 for i in range(43)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@async_test
async def test_handed_off_tokens_are_those_of_one_colocated_worker(params: SamplingParams):
    prefill = PrefillService(PrefillSettings(model=".", max_step_tokens=16), loader=lambda _: loaded_fake_model())
    decode = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model())
    both = DecodeService(
        DecodeSettings(model=".", role="both", max_step_tokens=8), loader=lambda _: loaded_fake_model()
    )
    a, b, c = await prefill.start(), await decode.start(), await both.start()
    async with MiniRouter(prefill=a, decode=b) as split, MiniRouter(decode=c) as colocated:
        expected = await colocated.generate_colocated("r", PROMPT, params=params)
        got = await split.generate("r", PROMPT, params=params)
        assert got == expected
        assert len(got) == 24
    for service in (prefill, decode, both):
        await service.drain()
        await service.stop()
