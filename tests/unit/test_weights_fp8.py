"""`--weights-dtype fp8_e4m3`: experts held as block-FP8 checkpoints store them, what that says of itself, refusals."""

import logging

import pytest
import torch
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    quantise_fp8,
    random_tensors,
    write_checkpoint,
    write_config,
    write_tensors,
)
from headrace_kernels import backend, use_backend
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.fp8_experts import empty_fp8_experts
from headrace_kernels.routing_rule import RoutedTokens

TOKENS = list(range(3, 40))
FP8 = WeightsDtype.FP8


def write(folder, name="v3", block=(128, 128), spoil=None, skip=""):
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    write_config(folder, {**TINY_CONFIGS[name], "quantization_config": quantisation})
    tensors = random_tensors(parse_config(folder), Variation())
    stored, plain = quantise_fp8(tensors, block)
    if skip:
        stored[skip] = plain[skip].to(torch.bfloat16)
        del stored[skip + "_scale_inv"]
    if spoil:
        spoil(stored)
    write_tensors(folder, stored)


def logits(model):
    sequences = PagedSequences(model, page_size=8, num_pages=8)
    (found,) = model.all_logits([sequences.chunk(0, TOKENS)], sequences.cache)
    return found


@pytest.mark.parametrize(
    ("name", "block"),
    [("v3", (128, 128)), ("v3", (8, 4)), ("v2", (8, 4)), ("glm4-moe-lite", (128, 128)), ("qwen3-moe", (128, 128))],
)
def test_experts_held_so_compute_what_dequantised_ones_do(name, block, tmp_path):
    write(tmp_path, name, block)
    with use_backend("reference"):
        wide, narrow = (load_model(tmp_path, dtype="float32", weights_dtype=each) for each in (WeightsDtype.AUTO, FP8))
        torch.testing.assert_close(logits(narrow), logits(wide), rtol=0, atol=1e-4)
    assert narrow.fingerprint != wide.fingerprint
    assert len(narrow.fingerprint) == len(wide.fingerprint)


@pytest.mark.skipif(backend(torch.empty(0)) != "cpu", reason="the compiled CPU kernels are not built: make setup")
def test_among_compiled_kernels_they_do_too(tmp_path):
    write(tmp_path)
    wide, narrow = (load_model(tmp_path, dtype="bfloat16", weights_dtype=each) for each in (WeightsDtype.AUTO, FP8))
    expected, found = logits(wide), logits(narrow)
    assert (found - expected).abs().median() < 0.05 * expected.abs().median()


def test_their_bytes_are_said_before_anything_is_allocated(tmp_path, caplog):
    write(tmp_path)
    config = parse_config(tmp_path)
    moe, hidden = config.moe, config.hidden_size
    layers = sum(config.is_moe_layer(index) for index in range(config.num_layers))
    values = layers * (moe.num_experts + moe.num_shared_experts) * 3 * hidden * moe.intermediate_size
    with caplog.at_level(logging.INFO):
        wide, narrow = (load_model(tmp_path, dtype="bfloat16", weights_dtype=each) for each in (WeightsDtype.AUTO, FP8))
    saved = wide.weight_bytes - narrow.weight_bytes
    assert 0 < values - saved < 0.1 * values  # a byte of two each, but for the scales
    told = [record for record in caplog.records if record.message == "weights"]
    assert [(each.dtype, each.compute_dtype, each.bytes) for each in told] == [
        ("bfloat16", "bfloat16", wide.weight_bytes),
        ("fp8_e4m3", "bfloat16", narrow.weight_bytes),
    ]


def refused(folder, reason="NO_FP8_WEIGHTS", error=StartupError, **options):
    with pytest.raises(error) as told:
        load_model(folder, weights_dtype=FP8, **options)
    assert told.value.reason == reason
    return str(told.value)


def test_what_is_not_stored_so_is_refused(tmp_path):
    write_checkpoint(tmp_path / "plain", TINY_CONFIGS["v3"])
    assert refused(tmp_path / "plain").endswith("the checkpoint has no experts in blocks of FP8; use auto")
    name = next(name for name in random_names(tmp_path / "plain") if ".experts.1." in name)
    write(tmp_path / "mixed", skip=name)
    assert f"tensor {name} is not stored in FP8; use auto" in refused(tmp_path / "mixed")
    write(tmp_path / "shared", "v2")
    assert "the shared experts, 16 wide each, begin within blocks of 128 x 128" in refused(tmp_path / "shared")
    write(tmp_path / "exact")
    if backend(torch.empty(0)) == "cpu":
        said = refused(tmp_path / "exact", "NO_EXACT", dtype="float32", numerics=Numerics.EXACT)
        assert said == "--numerics exact: there are no such kernels for --weights-dtype fp8_e4m3"


def random_names(folder):
    return random_tensors(parse_config(folder), Variation())


@pytest.mark.parametrize("what", ["value", "scale"])
def test_a_value_that_is_none_is_refused(tmp_path, what):
    def spoil(stored):
        name = next(name for name in stored if ".experts.1.up_proj" in name and not name.endswith("_inv"))
        if what == "value":
            stored[name].view(torch.uint8)[2, 3] = 0x7F
        else:
            stored[name + "_scale_inv"][0, 0] = float("inf")

    write(tmp_path, spoil=spoil)
    assert "1 of " in refused(tmp_path, "NON_FINITE_WEIGHT", CheckpointError)


def test_an_assignment_of_no_expert_adds_nothing():
    torch.manual_seed(0)
    part = BlockFp8(torch.randn(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1), (4, 4))
    with use_backend("reference"):
        experts = empty_fp8_experts(2, 4, 4, torch.empty(0), (4, 4))
        for expert in range(2):
            experts.put(expert, part, part, part)
        x, shares = torch.randn(2, 4), torch.ones(2, 1)
        found = experts(RoutedTokens(x, torch.tensor([[1], [-1]]), shares, None), torch.zeros(2, 4))
    assert found[0].abs().sum() > 0
    assert not found[1].any()


def test_a_weight_is_split_at_blocks_alone():
    weight = BlockFp8(torch.randn(8, 12).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5, (4, 4))
    for width, axis in ((4, 0), (8, 1), (8, 0)):
        pieces = [piece.to(torch.float32) for piece in weight.split(width, axis)]
        torch.testing.assert_close(torch.cat(pieces, axis), weight.to(torch.float32), rtol=0, atol=0)
    with pytest.raises(ValueError, match="pieces of 6 begin within blocks of 4"):
        weight.split(6, 1)
