"""A model of each family on two workers, over real gRPC: prompt here, hand-off, answer there; transformers' tokens."""

from __future__ import annotations

import asyncio

import pytest
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import FAMILIES
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

NAMES = ["v3", "v32", "v2-groups", "glm4-moe-lite", "kimi-k25", "mixtral", "qwen3-moe", "qwen3-moe-dense-layers"]
NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS = {"page_size": 16, "kv_pool_mib": 4, "max_step_tokens": 24, "roofline_every_steps": 0, "threads": 1}


def test_every_family_is_tried(checkpoint):
    tried = {parse_config(checkpoint(name)).family for name in NAMES}
    assert {"deepseek_v3" if name == "kimi_k2" else name for name in FAMILIES} == tried


def _telling_prompt(greedy, random_tokens, count):
    """Random networks like to repeat a token or two, which would show nothing."""
    candidates = (random_tokens(count, seed=seed) for seed in range(20))
    return next(prompt for prompt in candidates if len(set(greedy(prompt, NUM_TOKENS))) >= 16)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_after_a_handoff_are_transformers_own(name, checkpoint, oracle, random_tokens):
    greedy = oracle(checkpoint(name)).greedy
    prompts = [_telling_prompt(greedy, random_tokens, count) for count in (3, 16, 57)]
    expected = [greedy(prompt, NUM_TOKENS) for prompt in prompts]

    @async_test
    async def generate() -> None:
        prefill = PrefillService(PrefillSettings(model=checkpoint(name), **SETTINGS))
        decode = DecodeService(DecodeSettings(model=checkpoint(name), **SETTINGS))
        async with running(prefill, decode) as (a, b), MiniRouter(prefill=a, decode=b) as router:
            found = await asyncio.gather(
                *(router.generate(f"r{i}", prompt, params=GREEDY) for i, prompt in enumerate(prompts))
            )
            assert found == expected

    generate()
