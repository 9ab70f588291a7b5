"""A worker on a GPU from its start to its tokens: warmed up, decode steps captured and replayed, pages copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headrace_core.batch.step import Chunk
from headrace_core.config import DecodeSettings
from headrace_core.engine.executor import Executor
from headrace_core.model import decode_graphs
from headrace_core.testing.paged_sequences import greedy_plan
from headrace_core.testing.tiny_checkpoints import write_checkpoint
from headrace_core.worker import loading
from headrace_core.worker.loading import load_worker_model
from headrace_kernels import use_backend
from headrace_kernels.latent_fp8 import unpack_latents

from tests.parity.kernels.test_model import ONE_LAYER, PAGE_SIZE

PAGES = {0: [3, 1], 1: [0, 2]}
# The first comes to its second page when it decodes.
PROMPTS = {0: [(5 * i) % 150 + 2 for i in range(PAGE_SIZE)], 1: [9, 2, 6]}
NUM_STEPS = 3


@pytest.fixture
def settings(tmp_path):
    write_checkpoint(tmp_path, ONE_LAYER)
    return DecodeSettings(
        model=tmp_path,
        page_size=PAGE_SIZE,
        kv_pool_mib=1,
        max_context_tokens=2 * PAGE_SIZE,
        max_step_tokens=1,
        max_step_sequences=2,
    )


def generated(loaded):
    """Greedy tokens of both prompts, then one of the second alone; experts of every step; the first's pages."""
    executor, tokens, counts = Executor(loaded.model, loaded.cache), {0: [], 1: []}, []
    inputs, starts = dict(PROMPTS), {0: 0, 1: 0}
    for number in range(NUM_STEPS):
        keys = [0, 1] if number < NUM_STEPS - 1 else [1]
        chunks = [Chunk(key, inputs[key], starts[key], PAGES[key], True) for key in keys]
        result = executor.step(greedy_plan(chunks, PAGES[0] + PAGES[1] if number == 0 else []))
        assert not result.failures
        counts.append(result.expert_counts)
        for key, (token,) in result.tokens.items():
            tokens[key].append(token.token_id)
            starts[key] += len(inputs[key])
            inputs[key] = [token.token_id]
    loaded.cache.copy_to_host(PAGES[0])
    return tokens, counts, np.concatenate([np.frombuffer(loaded.cache.page_bytes(0, page), "u1") for page in PAGES[0]])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_a_decode_worker_on_a_gpu_generates_what_one_on_a_cpu_does(kv_cache_dtype, settings, device, monkeypatch):
    settings = settings.model_copy(update={"kv_cache_dtype": kv_cache_dtype})
    with use_backend("reference"):
        tokens, counts, pages = generated(load_worker_model(settings))
    # It takes as long as the rest and has tests of its own.
    monkeypatch.setattr(loading, "check_kernels", lambda *_, **__: 0.0)
    replayed = []
    run = decode_graphs.DecodeGraphs.run
    monkeypatch.setattr(decode_graphs.DecodeGraphs, "run", lambda *each: replayed.append(each) or run(*each))
    loaded = load_worker_model(settings.model_copy(update={"device": device}))
    replayed.clear()
    found_tokens, found_counts, found_pages = generated(loaded)
    assert len(replayed) == NUM_STEPS - 1
    assert found_tokens == tokens
    assert found_counts == counts
    if kv_cache_dtype == "auto":
        np.testing.assert_allclose(found_pages.view("f4"), pages.view("f4"), rtol=1e-4, atol=1e-5)
    else:
        found, expected = (unpack_latents(torch.from_numpy(each).view(-1, 32 + 4 + 32), 32, 16)
                           for each in (found_pages, pages))  # fmt: skip
        # What lies beside the middle of two numbers of fp8 may become either.
        torch.testing.assert_close(found, expected, rtol=1 / 8, atol=1e-5)
