"""Latents in 8 bits, through the network and the worker's settings, on a CPU."""

from __future__ import annotations

import pytest
import torch
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.engine.executor import Executor
from headrace_core.errors import StartupError
from headrace_core.kv.layout import CacheDtype
from headrace_core.model.load import load_model
from headrace_core.roofline.model_shape import Dtype
from headrace_core.testing.paged_sequences import PagedSequences, greedy_plan
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from headrace_core.worker.loading import load_worker_model
from headrace_kernels.latent_fp8 import pack_latents, unpack_latents

WIDTHS = TINY_CONFIGS["v3"]["kv_lora_rank"], TINY_CONFIGS["v3"]["qk_rope_head_dim"]
PAGE_SIZE = 4
PROMPT = [(5 * i + 3) % 150 + 2 for i in range(37)]
STEP_OF_FP8 = 1 / 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("v3")
    write_checkpoint(path, TINY_CONFIGS["v3"])
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def models(request, directory):
    """The same network with an fp8 cache and with a plain one."""
    return [load_model(directory, dtype=request.param, kv_cache_dtype=cached) for cached in ("fp8_e4m3", "auto")]


def computed(model, pieces, beside=()):
    """Write the prompt in pieces of so many tokens, with others beside it; return its rows by layer and last logits."""
    sequences, done, logits = PagedSequences(model, page_size=PAGE_SIZE, num_pages=60), 0, torch.empty(0)
    for number, length in enumerate(pieces):
        chunks = [sequences.chunk(0, PROMPT[done : done + length])]
        chunks += [sequences.chunk(key, [11 + number + key]) for key in beside]
        done += length
        logits = model.forward(chunks, sequences.cache)[0]
    pages = sequences.chunk(0, [2]).page_ids[: -(-done // PAGE_SIZE)]
    return [layer[pages].flatten(0, 1)[:done] for layer in sequences.cache.layers], logits


def test_a_row_is_the_packed_row_of_a_plain_cache(models):
    """Of the first layer, whose latents do not depend on what was cached: every byte."""
    rows, plain = (computed(model, [len(PROMPT)])[0] for model in models)
    assert rows[0].dtype == torch.uint8
    assert torch.equal(rows[0], pack_latents(plain[0], *WIDTHS))


@pytest.mark.parametrize(
    ("pieces", "beside"),
    [([20, 17], ()), ([7, 7, 7, 7, 7, 2], (1, 2)), ([1] * len(PROMPT), ()), ([30] + [1] * 7, (1,))],
    ids=["two chunks", "chunks beside others", "alone, token by token", "prompt, then decoded"],
)
def test_the_same_rows_whoever_writes_them(models, pieces, beside):
    """Sums differ in their last bits with a step's shape (ADR 0007), so a number near a middle may be its neighbour."""
    model = models[0]
    once, logits = computed(model, [len(PROMPT)])
    rows, others = computed(model, pieces, beside)
    for found, expected in zip(rows, once, strict=True):
        if model.dtype == torch.float32:
            latents = slice(WIDTHS[0])
            assert (found[:, latents] != expected[:, latents]).float().mean() < 0.01
            values, wanted = unpack_latents(found, *WIDTHS), unpack_latents(expected, *WIDTHS)
            torch.testing.assert_close(values, wanted, rtol=STEP_OF_FP8, atol=1e-4)
    assert (others - logits).norm() < 0.05 * logits.norm()


def test_every_token_is_read_as_it_was_written(models):
    """A prompt attends to its own tokens in 8 bits, as those that come later do: its logits are not the plain ones."""
    fp8, plain = (computed(model, [len(PROMPT)])[1] for model in models)
    difference = (fp8 - plain).norm() / plain.norm()
    assert 1e-3 < difference < 0.25
    if models[0].dtype == torch.float32:
        alone = computed(models[0], [1] * len(PROMPT))[1]
        assert (alone - fp8).norm() < 0.01 * (alone - plain).norm()


@pytest.mark.parametrize("part", ["latent", "scale", "rope"])
def test_a_row_that_is_not_finite_gives_no_token(models, part):
    """0xFF is NaN in a latent, a scale and a rope column."""
    model = models[0]
    sequences = PagedSequences(model, page_size=PAGE_SIZE, num_pages=20)
    model.forward([sequences.chunk(0, PROMPT[:9])], sequences.cache)
    page = sequences.chunk(0, [7]).page_ids[1]
    first = {"latent": 3, "scale": WIDTHS[0], "rope": WIDTHS[0] + 4}[part]
    sequences.cache.layers[1][page, 2, first : first + 4] = 0xFF
    result = Executor(model, sequences.cache).step(greedy_plan([sequences.chunk(0, [9])]))
    assert result.failures[0].reason == "BAD_LOGITS"


def test_keys_and_values_are_refused_before_anything_is_read(tmp_path):
    write_checkpoint(tmp_path, TINY_CONFIGS["mixtral"])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartupError, match=r"--kv-cache-dtype fp8_e4m3: .*\(MLA\) alone.*use auto") as caught:
        load_model(tmp_path, kv_cache_dtype="fp8_e4m3")
    assert caught.value.reason == "NO_FP8_CACHE"


def test_widths_that_would_not_be_aligned_are_refused(tmp_path):
    write_checkpoint(tmp_path, {**TINY_CONFIGS["v3"], "kv_lora_rank": 18})
    with pytest.raises(StartupError, match=r"multiple of 4.*not 18 and 8") as caught:
        load_model(tmp_path, kv_cache_dtype="fp8_e4m3")
    assert caught.value.reason == "NO_FP8_CACHE"


def test_a_workers_pool_holds_more_pages_and_its_roofline_counts_their_bytes(directory):
    for settings in (PrefillSettings(model=directory, kv_pool_mib=1), DecodeSettings(model=directory, kv_pool_mib=1)):
        plain = load_worker_model(settings)
        fp8 = load_worker_model(settings.model_copy(update={"kv_cache_dtype": "fp8_e4m3"}))
        assert fp8.layout.dtype is CacheDtype.FP8_E4M3
        assert fp8.layout.token_bytes == 3 * (16 + 4 + 16)
        assert (plain.num_pages, fp8.num_pages) == ((1 << 20) // (64 * 3 * 96), (1 << 20) // (64 * 3 * 36))
        assert fp8.fingerprint == plain.fingerprint, "the cache's type is the layout's affair"
        assert (plain.prediction.kv_dtype, fp8.prediction.kv_dtype) == (Dtype.FP32, Dtype.FP8)
        assert fp8.prediction.shape.kv_bytes_per_token(Dtype.FP8) == fp8.layout.token_bytes
        assert fp8.prediction.dtype is Dtype.FP32
