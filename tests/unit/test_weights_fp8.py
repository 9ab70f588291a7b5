"""`--weights-dtype fp8_e4m3`: weights held as block-FP8 checkpoints store them, what that says of itself, refusals."""

import logging

import pytest
import torch
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.families.config_json import parse_config
from headrace_core.families.table import weights as weight_tree
from headrace_core.model.build import num_weight_bytes
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import WeightsDtype, holding
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import Sharding
from headrace_core.roofline.communication import ONE_GPU
from headrace_core.roofline.memory import weight_bytes_per_gpu
from headrace_core.roofline.model_shape import DEEPSEEK_V3, Dtype
from headrace_core.testing.paged_sequences import PagedSequences, generate_greedy
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    random_tensors,
    write_checkpoint,
    write_config,
    write_fp8_checkpoint,
    write_tensors,
)
from headrace_kernels import backend, use_backend
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.experts import empty_experts
from headrace_kernels.linear import Linear
from headrace_kernels.routing_rule import RoutedTokens

TOKENS = list(range(3, 40))
FP8 = WeightsDtype.FP8
HAS_LIBRARY = backend(torch.empty(0)) == "cpu"
KERNELS = ["reference", *(["cpu"] if HAS_LIBRARY else [])]
CASES = [
    ("v3", (128, 128)),
    ("v3", (8, 4)),
    ("v3-bias", (16, 16)),
    ("v3-no-q-lora", (128, 128)),
    ("v32", (128, 128)),
    ("v2", (8, 4)),
    ("glm4-moe-lite", (128, 128)),
    ("qwen3-moe-dense-layers", (128, 128)),
]
# Sides that blocks and panels divide, but for the latent with its rope key and the indexer's key.
SIZES = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_attention_heads": 4,
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "vocab_size": 160,
}  # fmt: skip


def write(folder, name="v3", block=(128, 128), spoil=None, skip=(), sizes=None, num_mtp_layers=0):
    config = {**TINY_CONFIGS[name], **(sizes or {})}
    stored, plain = write_fp8_checkpoint(folder, config, block, Variation(num_mtp_layers=num_mtp_layers))
    for each in [skip] if isinstance(skip, str) else skip:
        stored[each] = plain[each].to(torch.bfloat16)
        del stored[each + "_scale_inv"]
    if spoil:
        spoil(stored)
    write_tensors(folder, stored)


def logits(model):
    sequences = PagedSequences(model, page_size=8, num_pages=8)
    (found,) = model.all_logits([sequences.chunk(0, TOKENS)], sequences.cache)
    return found


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("name", "block"), CASES)
def test_weights_held_so_compute_what_dequantised_ones_do(name, block, kernels, tmp_path):
    write(tmp_path, name, block)
    with use_backend(kernels):
        wide, narrow = (load_model(tmp_path, dtype="float32", weights_dtype=each) for each in (WeightsDtype.AUTO, FP8))
        torch.testing.assert_close(logits(narrow), logits(wide), rtol=0, atol=1e-4)
        if kernels != "reference":
            prompts = [TOKENS[:20], TOKENS[5:9]]
            tokens = [generate_greedy(model, prompts, 24, page_size=16, max_chunk=8) for model in (wide, narrow)]
            assert tokens[0] == tokens[1]
    assert narrow.fingerprint != wide.fingerprint
    assert len(narrow.fingerprint) == len(wide.fingerprint)


@pytest.mark.parametrize("kernels", KERNELS)
def test_in_bfloat16_they_are_nearer_to_the_truth_than_dequantised_ones(kernels, tmp_path):
    """Activations are not quantised on a CPU, and a weight is not rounded to bfloat16."""
    write(tmp_path)
    with use_backend(kernels):
        truth = logits(load_model(tmp_path, dtype="float32"))
        wide, narrow = (
            logits(load_model(tmp_path, dtype="bfloat16", weights_dtype=each)) for each in (WeightsDtype.AUTO, FP8)
        )
    assert (narrow - truth).abs().median() < 1.1 * (wide - truth).abs().median()


def test_the_module_for_multi_token_prediction_is_held_so_too(tmp_path):
    write(tmp_path, num_mtp_layers=1)
    wide, narrow = (
        load_model(tmp_path, dtype="float32", weights_dtype=each, has_mtp=True) for each in (WeightsDtype.AUTO, FP8)
    )
    for model in (wide, narrow):
        assert model._weights.mtp is not None
    assert not wide._weights.mtp.join.is_fp8
    assert narrow._weights.mtp.join.is_fp8
    x = torch.randn(3, narrow._weights.mtp.join.in_features)
    torch.testing.assert_close(narrow._weights.mtp.join(x), wide._weights.mtp.join(x), rtol=0, atol=1e-4)


def multiplied(monkeypatch, folder, **options):
    """Return the linear layers that a model was built of."""
    layers, make = [], Linear.__init__

    def note(layer, *args, **kwargs):
        make(layer, *args, **kwargs)
        layers.append(layer)

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__init__", note)
        return load_model(folder, **options), layers


@pytest.mark.parametrize("name", ["v3", "v32"])
def test_every_linear_layer_that_is_stored_so_is_held_so(name, tmp_path, monkeypatch):
    write(tmp_path / "all", name)
    _, layers = multiplied(monkeypatch, tmp_path / "all", dtype="bfloat16", weights_dtype=FP8)
    assert [layer.is_fp8 for layer in layers] == [False] + (len(layers) - 1) * [True], "all but the head"
    # One of those that are computed as one: the others of that layer follow it.
    prefix = "model.layers.1.self_attn."
    write(tmp_path / "some", name, skip=[prefix + "kv_a_proj_with_mqa.weight", prefix + "o_proj.weight"])
    model, layers = multiplied(monkeypatch, tmp_path / "some", dtype="float32", weights_dtype=FP8)
    assert [layer.is_fp8 for layer in layers].count(False) == 3
    expected = logits(load_model(tmp_path / "some", dtype="float32"))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def tensors_of(thing, seen):
    """Return the bytes of all tensors that `thing` holds, each memory once."""
    if isinstance(thing, torch.Tensor):
        memory = thing.untyped_storage()
        is_new = memory.data_ptr() not in seen
        seen.add(memory.data_ptr())
        return memory.nbytes() if is_new else 0
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, list | tuple):
        return sum(tensors_of(each, seen) for each in thing)
    if not type(thing).__module__.startswith("headrace_"):
        return 0
    names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name) for name in names)]
    return sum(tensors_of(each, seen) for each in values)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weights_dtype", [WeightsDtype.AUTO, FP8])
@pytest.mark.parametrize("name", ["v3", "v32"])
def test_what_is_said_of_their_bytes_is_what_they_take(name, weights_dtype, kernels, tmp_path):
    write(tmp_path, name, sizes=SIZES | ({"index_head_dim": 64} if name == "v32" else {}))
    with use_backend(kernels):
        model = load_model(tmp_path, dtype="float32", weights_dtype=weights_dtype)
    # Of the compiled kernels a panel of 16 outputs has scales of its own: here 1 in 512 bytes.
    assert model.weight_bytes <= tensors_of(model._weights, set()) <= 1.005 * model.weight_bytes


def test_their_bytes_are_said_before_anything_is_allocated(tmp_path, caplog):
    write(tmp_path, sizes=SIZES)
    config = parse_config(tmp_path)
    layer_weights = [weight for index in range(config.num_layers) for weight in weight_tree(config).layer(index)]
    is_number = ("kv_b_proj", "gate.weight")
    values = sum(
        weight.shape[0] * weight.shape[1]
        for weight in layer_weights
        if len(weight.shape) == 2 and not any(name in weight.name for name in is_number)
    )
    with caplog.at_level(logging.INFO):
        wide, narrow = (load_model(tmp_path, dtype="bfloat16", weights_dtype=each) for each in (WeightsDtype.AUTO, FP8))
    saved = wide.weight_bytes - narrow.weight_bytes
    assert 0 < values - saved < 0.001 * values  # a byte of two each, but for the scales
    told = [record for record in caplog.records if record.message == "weights"]
    assert [(each.dtype, each.compute_dtype, each.bytes) for each in told] == [
        ("bfloat16", "bfloat16", wide.weight_bytes),
        ("fp8_e4m3", "bfloat16", narrow.weight_bytes),
    ]


def test_the_roofline_says_the_same_of_deepseek_v3(tmp_path):
    """Whose kv_b_proj it counts in FP8: 1.0 GB of 674."""
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v3", "num_attention_heads": 128, "torch_dtype": "bfloat16"}
    write_config(tmp_path, {**config, "quantization_config": quantisation})
    parsed, alone = parse_config(tmp_path), Sharding(ParallelLayout(), 0)
    like = torch.empty(0, dtype=torch.bfloat16)
    held = holding(FP8, parsed, lambda name: "layers" in name and ".gate." not in name, alone, lambda: like)
    said = num_weight_bytes(parsed, torch.bfloat16, held)
    assert said == pytest.approx(674.4e9, rel=1e-3)
    assert weight_bytes_per_gpu(DEEPSEEK_V3, ONE_GPU, Dtype.FP8) == pytest.approx(said, rel=3e-3)


def refused(folder, reason="NO_FP8_WEIGHTS", error=StartupError, **options):
    with pytest.raises(error) as told:
        load_model(folder, weights_dtype=FP8, **options)
    assert told.value.reason == reason
    return str(told.value)


def test_what_is_not_stored_so_is_refused(tmp_path):
    write_checkpoint(tmp_path / "plain", TINY_CONFIGS["v3"])
    assert refused(tmp_path / "plain").endswith("the checkpoint has no weights in blocks of FP8; use auto")
    name = next(name for name in random_names(tmp_path / "plain") if ".experts.1." in name)
    write(tmp_path / "mixed", skip=name)
    assert f"tensor {name} is not stored in FP8, as all experts must be; use auto" in refused(tmp_path / "mixed")
    write(tmp_path / "exact")
    if HAS_LIBRARY:
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
        experts = empty_experts(2, 4, 4, torch.empty(0), fp8_blocks=((4, 4), (4, 4)))
        for expert in range(2):
            experts.put(expert, part, part, part)
        x, shares = torch.randn(2, 4), torch.ones(2, 1)
        found = experts(RoutedTokens(x, torch.tensor([[1], [-1]]), shares, None), torch.zeros(2, 4))
    assert found[0].abs().sum() > 0
    assert not found[1].any()
