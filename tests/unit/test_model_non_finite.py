"""Numbers that are not finite are an error by name: in a checkpoint at its loading, in a network at the next token."""

from __future__ import annotations

import re

import pytest
import torch
from headrace_core.engine.executor import Executor
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.model.build import build_network
from headrace_core.model.load import load_model
from headrace_core.model.model import Model, ModelIdentity
from headrace_core.testing.paged_sequences import PagedSequences, greedy_plan
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    quantise_fp8,
    random_tensors,
    write_checkpoint,
    write_config,
    write_tensors,
)
from headrace_kernels.finite import is_finite

NAN, INF = float("nan"), float("inf")
CONFIGS = {
    "v3": {**TINY_CONFIGS["v3"], "num_hidden_layers": 2},
    "v3-bias": {**TINY_CONFIGS["v3-bias"], "num_hidden_layers": 2},
    "v32": {**TINY_CONFIGS["v32"], "num_hidden_layers": 2},
    "v2-groups": {**TINY_CONFIGS["v2-groups"], "num_hidden_layers": 2},
    "mixtral": {**TINY_CONFIGS["mixtral"], "num_hidden_layers": 1},
}
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def refusal(directory, dtype="auto"):
    with pytest.raises(CheckpointError) as caught:
        load_model(directory, dtype=dtype)
    assert caught.value.reason == "NON_FINITE_WEIGHT"
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tensor_of_a_checkpoint_may_hold_a_nan(name, tmp_path):
    tensors = write_checkpoint(tmp_path, CONFIGS[name], Variation(dtype=torch.bfloat16))
    for spoilt in tensors:
        place = [length - 1 for length in tensors[spoilt].shape]
        changed = tensors[spoilt].clone()
        changed[tuple(place)] = NAN
        write_tensors(tmp_path, {**tensors, spoilt: changed})
        assert f"tensor {spoilt}: 1 of {changed.numel()} values" in (message := refusal(tmp_path))
        assert f"the first at {place}" in message


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spoilt", [EXPERT, BIAS, "model.embed_tokens.weight", "model.norm.weight"])
def test_every_type_is_looked_at_and_the_values_are_counted(spoilt, dtype, value, tmp_path):
    tensors = write_checkpoint(tmp_path, CONFIGS["v3"], Variation(dtype=dtype, num_shards=2))
    tensors[spoilt].view(-1)[2:5] = value
    write_tensors(tmp_path, tensors, num_shards=2)
    assert f"tensor {spoilt}: 3 of {tensors[spoilt].numel()} values are NaN or infinite" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "spoil", "message"),
    [
        ("", lambda tensor: tensor.view(torch.uint8).view(-1)[7:9].copy_(torch.tensor([0x7F, 0xFF])), ": 2 of 512"),
        ("_scale_inv", lambda tensor: tensor[0, 1:].fill_(NAN), "_scale_inv: 1 of 8"),
        ("_scale_inv", lambda tensor: tensor[0, 1:].fill_(INF), "_scale_inv: 1 of 8"),
        ("_scale_inv", lambda tensor: tensor[0, 1:].fill_(3e38), r": \d+ of 512 values are larger than torch.float32"),
    ],
)
def test_fp8_weights_and_their_scales_are_looked_at(suffix, spoil, message, tmp_path):
    config = {**CONFIGS["v3"], "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    write_config(tmp_path, config)
    tensors, _ = quantise_fp8(random_tensors(parse_config(tmp_path), Variation()), (8, 8))
    write_tensors(tmp_path, tensors)
    load_model(tmp_path)
    spoil(tensors[EXPERT + suffix])
    write_tensors(tmp_path, tensors)
    assert re.search(re.escape(f"tensor {EXPERT}") + message, refusal(tmp_path))


@pytest.mark.parametrize("scale_dtype", [torch.int32, torch.uint8])
def test_scales_that_are_no_numbers_of_ours_are_named(scale_dtype, tmp_path):
    config = {**CONFIGS["v3"], "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    write_config(tmp_path, config)
    tensors, _ = quantise_fp8(random_tensors(parse_config(tmp_path), Variation()), (8, 8))
    tensors[EXPERT + "_scale_inv"] = tensors[EXPERT + "_scale_inv"].to(scale_dtype)
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"tensor {EXPERT}_scale_inv is ") as caught:
        load_model(tmp_path)
    assert caught.value.reason == "UNSUPPORTED_MODEL"


def test_what_the_compute_type_can_not_hold_is_refused_with_the_way_out(tmp_path):
    tensors = write_checkpoint(tmp_path, CONFIGS["v3"])
    tensors[EXPERT][2, 3] = 1e5
    write_tensors(tmp_path, tensors)
    load_model(tmp_path, dtype="bfloat16")
    message = refusal(tmp_path, dtype="float16")
    assert f"tensor {EXPERT}: 1 of 512 values are larger than torch.float16" in message
    assert "--dtype" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_wherever_it_stands_it_is_seen(value, dtype):
    """Vectors and what is left of them are compared by different code."""
    assert is_finite(torch.zeros(0, dtype=dtype))
    for length in range(1, 70):
        for place in {0, length // 2, length - 1}:
            values = torch.randn(length).to(dtype)
            assert is_finite(values)
            values[place] = value
            assert not is_finite(values), (length, place)


class Weights:
    """A `WeightSource` of tensors that no check has seen."""

    def __init__(self, tensors):
        self._tensors = tensors

    def take(self, name, dtype=None, shard=None):
        return self._tensors[name].clone()

    def empty(self, *shape):
        return torch.empty(shape)


def network(config, tensors):
    return Model(config, ModelIdentity("", torch.float32, 0), build_network(config, Weights(tensors)))


def kinds(tensors):
    """Names of tensors that do the same, together: one expert is not every token's."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(re.sub(r"experts\.\d+\.", "experts.*.", name), []).append(name)
    return groups


def outcome(model, chunk, sequences):
    result = Executor(model, sequences.cache).step(greedy_plan([chunk]))
    return result.failures[chunk.key].reason if result.failures else result.tokens[chunk.key][0].token_id


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_no_weight_that_is_not_finite_gives_a_token(name, value, tmp_path):
    """As if it had changed in memory: prompts of any length, and a token after a prompt that was sound."""
    write_config(tmp_path, CONFIGS[name])
    config = parse_config(tmp_path)
    tensors = random_tensors(config, Variation())
    sound = network(config, tensors)
    for kind, names in kinds(tensors).items():
        spoilt = network(config, tensors | {each: torch.full_like(tensors[each], value) for each in names})
        for length in (1, 7, 17):
            sequences = PagedSequences(sound, page_size=4, num_pages=20)
            prompt = [(5 * i + 3) % 150 + 2 for i in range(length)]
            assert outcome(spoilt, sequences.chunk(0, prompt), sequences) == "BAD_LOGITS", (kind, length)
            assert isinstance(outcome(sound, sequences.chunk(1, prompt), sequences), int)
            assert outcome(spoilt, sequences.chunk(1, [9]), sequences) == "BAD_LOGITS", (kind, length)


def test_a_part_of_a_prompt_that_is_not_finite_fails_alone_in_one_run_of_its_step(tmp_path):
    """It samples nothing, so nobody would look at it; what is beside it is not computed again."""
    write_config(tmp_path, CONFIGS["v3"])
    config = parse_config(tmp_path)
    tensors = random_tensors(config, Variation())
    tensors["model.embed_tokens.weight"][7] = NAN
    model = network(config, tensors)
    sequences = PagedSequences(model, page_size=4, num_pages=20)
    bad = sequences.chunk(0, [5, 7, 9], is_sampled=False)
    good = sequences.chunk(1, [5, 6, 9])
    unsampled = sequences.chunk(2, [5, 6, 9], is_sampled=False)
    step = Executor(model, sequences.cache).step
    result = step(greedy_plan([bad, good, unsampled]))
    assert {key: error.reason for key, error in result.failures.items()} == {0: "BAD_LOGITS"}
    assert "positions 0 to 2" in str(result.failures[0])
    assert list(result.tokens) == [1]
    assert not step(greedy_plan([sequences.chunk(1, [3])])).failures, "it is told once"
