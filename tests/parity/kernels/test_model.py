"""The whole network through the kernels, as on a GPU, against the network in plain torch and its greedy tokens."""

from __future__ import annotations

import pytest
import torch
from headrace_core.errors import StartupError
from headrace_core.model import self_check
from headrace_core.model.load import load_model
from headrace_core.model.self_check import check_kernels
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint, write_fp8_checkpoint
from headrace_kernels import backend, use_backend

# Widths that matrix units take: multiples of 16.
WIDTHS = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32}
CONFIGS = {
    "v3": {**TINY_CONFIGS["v3"], **WIDTHS, "num_hidden_layers": 2},
    "v32": {**TINY_CONFIGS["v32"], **WIDTHS, "num_hidden_layers": 2, "index_head_dim": 24},
    "v2": {**TINY_CONFIGS["v2"], **WIDTHS, "q_lora_rank": None, "num_hidden_layers": 2, "first_k_dense_replace": 0},
    "glm4-moe-lite": {**TINY_CONFIGS["glm4-moe-lite"], **WIDTHS, "num_hidden_layers": 2},
    "mixtral": {**TINY_CONFIGS["mixtral"], "head_dim": 16},
    "qwen3-moe": TINY_CONFIGS["qwen3-moe"],
}
ONE_LAYER = {**CONFIGS["v2"], "num_hidden_layers": 1}
PAGE_SIZE = 16


def run(model, *, is_captured):
    """Logits after prompts of several lengths, decode steps of 1 to 3 sequences, and a step that mixes both."""
    sequences = PagedSequences(model, page_size=PAGE_SIZE, num_pages=12)
    if is_captured:
        model.prepare_decode(sequences.cache, max_rows=3, max_context_tokens=64)
    prompts = [[(3 * i + 5 * key) % 150 + 2 for i in range(length)] for key, length in enumerate((19, 16, 1))]
    steps = [
        [sequences.chunk(0, prompts[0]), sequences.chunk(1, prompts[1][:7], is_sampled=False)],
        [sequences.chunk(0, [9]), sequences.chunk(1, prompts[1][7:]), sequences.chunk(2, prompts[2])],
        [sequences.chunk(1, [11])],
        [sequences.chunk(0, [12]), sequences.chunk(1, [13]), sequences.chunk(2, [14])],
    ]
    # A captured step's logits lie where the next one's will.
    logits = torch.cat([model.forward(chunks, sequences.cache).clone() for chunks in steps])
    return logits, model.take_expert_counts()


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_give_the_networks_logits(name, tmp_path, device):
    write_checkpoint(tmp_path, CONFIGS[name])
    with use_backend("reference"):
        expected, expected_counts = run(load_model(tmp_path, device=device), is_captured=False)
    model = load_model(tmp_path, device=device)
    assert model.fingerprint
    for is_captured in (False, True):
        logits, counts = run(model, is_captured=is_captured)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert counts == expected_counts


def test_kernels_over_an_fp8_cache_give_the_networks_logits(tmp_path, device):
    """A latent that differs in its last bit may be another number of fp8, so logits are less close than in float32."""
    write_checkpoint(tmp_path, CONFIGS["v3"])
    fp8 = {"device": device, "kv_cache_dtype": "fp8_e4m3"}
    with use_backend("reference"):
        plain, _ = run(load_model(tmp_path, device=device), is_captured=False)
        expected, _ = run(load_model(tmp_path, **fp8), is_captured=False)
    model = load_model(tmp_path, **fp8)
    for is_captured in (False, True):
        logits, _ = run(model, is_captured=is_captured)
        assert (logits - expected).norm() < 0.3 * (plain - expected).norm()


def test_a_worker_with_an_fp8_cache_may_start(tmp_path, device):
    write_checkpoint(tmp_path, ONE_LAYER)
    assert check_kernels(load_model(tmp_path, device=device, kv_cache_dtype="fp8_e4m3"), device) < 0.05


def test_a_worker_whose_weights_stay_in_fp8_may_start(tmp_path, device):
    """All experts are chosen: in bfloat16 two that are nearly tied would be one here and the other there."""
    write_fp8_checkpoint(tmp_path, {**CONFIGS["v3"], "num_experts_per_tok": 8, "topk_group": 4})
    model = load_model(tmp_path, device=device, dtype="bfloat16", weights_dtype=WeightsDtype.FP8)
    assert check_kernels(model, device) < 0.1


def test_a_kernel_that_is_wrong_keeps_the_worker_from_starting(tmp_path, monkeypatch, device):
    write_checkpoint(tmp_path, ONE_LAYER)
    model = load_model(tmp_path, device=device)
    assert check_kernels(model, device) < 1e-4
    right = self_check.Model.forward

    def wrong(self, chunks, cache):
        logits = right(self, chunks, cache)
        return logits if backend(logits) == "reference" else logits * 1.01

    monkeypatch.setattr(self_check.Model, "forward", wrong)
    with pytest.raises(StartupError) as caught:
        check_kernels(model, device)
    assert caught.value.reason == "KERNELS_DISAGREE"


def test_pages_that_kernels_do_not_take_keep_the_worker_from_starting(tmp_path, device):
    write_checkpoint(tmp_path, ONE_LAYER)
    with pytest.raises(StartupError, match=r"--page-size 8.*multiple of 16") as caught:
        check_kernels(load_model(tmp_path, device=device), device, page_size=8)
    assert caught.value.reason == "NO_KERNEL"
