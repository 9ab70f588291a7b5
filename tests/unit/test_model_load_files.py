"""Which of a checkpoint's files are read, as transformers does; what is there and can't be is refused by name."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from dataclasses import replace

import pytest
import torch
from headrace_core.checkpoint.safetensors_file import read_headers
from headrace_core.checkpoint.weight_reader import WeightReader
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.model.load import load_model
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    write_checkpoint,
    write_config,
    write_tensors,
)
from safetensors.torch import load_file, save_file

CONFIG = {**TINY_CONFIGS["v3"], "num_hidden_layers": 2}
NORM = "model.layers.1.input_layernorm.weight"


DEEP = "[" * 200_000


def test_a_header_or_an_index_nested_too_deep_is_refused(tmp_path, written, refusal):
    header = f'{{"a": {DEEP}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refusal("DAMAGED_FILE", r"model\.safetensors: its header can't be read as JSON")
    path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    refusal("DAMAGED_FILE", r"index\.json: it is no index")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["link to nothing", "pipe"])
def test_what_is_there_but_no_file_is_named(tmp_path, written, refusal, name, kind):
    (tmp_path / name).unlink(missing_ok=True)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("nowhere")
    if kind == "link to nothing" and name.endswith(".json"):
        refusal("UNREADABLE_FILE", rf"{name} can't be read: No such file")
    else:
        refusal("BAD_CONFIG" if name == "config.json" else "DAMAGED_FILE", name)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors", "config.json"])
def test_what_the_system_does_not_let_us_read_is_not_called_damaged(tmp_path, written, refusal, name):
    (tmp_path / name).unlink(missing_ok=True)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")  # a regular file, of which the first byte can't be read
    refusal("UNREADABLE_FILE", rf"{name} can't be read: Input/output error; see that this user may read it")


def test_a_file_that_can_not_be_read_any_more_is_not_called_damaged(tmp_path, written):
    stored = read_headers(tmp_path)[NORM]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        replace(stored, offset=0).read()
    assert caught.value.reason == "UNREADABLE_FILE"


def test_a_shard_with_a_name_too_long_for_a_file_is_refused(tmp_path, written, refusal):
    (tmp_path / "model.safetensors").unlink()
    text = json.dumps({"weight_map": {NORM: "a" * 300}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal("DAMAGED_FILE", "index")


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts"])
def test_more_tensors_than_anybody_has_cost_no_more_than_the_first_that_is_missing(tmp_path, written, refusal, field):
    write_config(tmp_path, {**CONFIG, field: 10**9, "n_group": 1, "topk_group": 1})
    tracemalloc.start()
    try:
        refusal("MISSING_TENSOR" if field == "num_hidden_layers" else "BAD_TENSOR_SHAPE", "is ")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_missing_weights_are_refused(tmp_path, written, refusal):
    (tmp_path / "model.safetensors").unlink()
    refusal("DAMAGED_FILE", r"neither model\.safetensors")


def test_a_missing_shard_is_named(tmp_path, written, refusal):
    write_tensors(tmp_path, written, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refusal("DAMAGED_FILE", "model-00002-of-00003")


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": 3, "b": "c"}}']
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path, written, refusal, text):
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal("DAMAGED_FILE", "index")


def test_an_index_can_not_point_out_of_the_folder(tmp_path, written, refusal):
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "model.safetensors")
    text = json.dumps({"weight_map": {NORM: "../model.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal("DAMAGED_FILE", "index")


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path, written):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert {tensor.path.name for tensor in read_headers(tmp_path).values()} == {"model.safetensors"}


FIRST, SECOND = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_a_tensor_in_two_shards_is_that_of_the_shard_that_the_index_names(tmp_path, written, named):
    write_tensors(tmp_path, written, num_shards=2)
    twice = {NORM: written[NORM] + 1}
    for name in (FIRST, SECOND):
        tensors = load_file(tmp_path / name)
        save_file(tensors | ({NORM: written[NORM]} if name == named else twice), tmp_path / name)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = named
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_headers(tmp_path)[NORM].read(), written[NORM])


def test_a_tensor_in_two_shards_of_which_the_index_names_neither_is_refused(tmp_path, written, refusal):
    write_tensors(tmp_path, written, num_shards=2)
    for name in (FIRST, SECOND):
        save_file(load_file(tmp_path / name) | {NORM: written[NORM]}, tmp_path / name)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"][NORM]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal("DAMAGED_FILE", rf"{SECOND}: tensor {NORM} is in {FIRST} too, and the index does not say which")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model-Q4.gguf"])
def test_a_folder_with_weights_of_other_formats_alone_is_told_so(tmp_path, written, refusal, name):
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refusal("UNSUPPORTED_MODEL", rf"weights are there as {name} alone; Headrace reads safetensors")


@pytest.mark.parametrize("number", [0, None])
def test_shared_experts_that_config_denies_are_refused_in_so_many_words(tmp_path, written, refusal, number):
    write_config(tmp_path, {**CONFIG, "n_shared_experts": number})
    refusal("EXTRA_TENSOR", r"no shared experts \(n_shared_experts 0 or null\), but tensor .*shared_experts.* is there")


def test_shared_experts_of_no_width_are_none(tmp_path, written):
    write_config(tmp_path, {**CONFIG, "n_shared_experts": 0})
    shared = {name for name in written if "shared_experts" in name}
    assert shared
    for name in shared:
        sides = tuple(written[name].shape)
        written[name] = torch.empty((sides[0], 0) if "down_proj" in name else (0, sides[1]))
    write_tensors(tmp_path, written)
    load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float64])
def test_scales_of_a_type_that_says_nothing_are_refused(tmp_path, written, refusal, dtype):
    name = "model.layers.0.self_attn.o_proj.weight"
    written[name] = written[name].to(torch.float8_e4m3fn)
    written[name + "_scale_inv"] = torch.ones(1, 1, dtype=dtype)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write_config(tmp_path, {**CONFIG, "quantization_config": quantisation})
    write_tensors(tmp_path, written)
    refusal("UNSUPPORTED_MODEL", rf"tensor {name}_scale_inv is .*; Headrace reads scales that are F32.*F8_E8M0")


def test_scales_that_are_powers_of_two_alone_are_read(tmp_path, written):
    """E8M0: eight bits of an exponent, the type of scales in newer checkpoints."""
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = written[name].clone()
    written[name] = weight.to(torch.float8_e4m3fn)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    write_config(tmp_path, {**CONFIG, "quantization_config": quantisation})
    sides = [-(-side // 16) for side in weight.shape]
    exponents = (torch.arange(math.prod(sides), dtype=torch.uint8) % 5 + 125).reshape(sides)
    taken: list[torch.Tensor] = []
    for scale in (exponents.view(torch.float8_e8m0fnu), torch.exp2(exponents.float() - 127)):
        written[name + "_scale_inv"] = scale
        write_tensors(tmp_path, written)
        load_model(tmp_path)
        reader = WeightReader(
            read_headers(tmp_path),
            parse_config(tmp_path),
            dtype=torch.float32,
            device="cpu",
            on_progress=lambda _: None,
        )
        taken.append(reader.take(name))
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], written[name].float())


def test_only_a_model_that_sees_may_bring_what_it_sees_with(tmp_path):
    kimi = TINY_CONFIGS["kimi-k25"]
    others = {"vision_tower.patch.weight": torch.zeros(2), "mm_projector.b": torch.ones(1)}
    text = write_checkpoint(tmp_path / "text", kimi)
    write_config(tmp_path / "whole", kimi)
    write_tensors(tmp_path / "whole", {**text, **others})
    assert load_model(tmp_path / "whole").fingerprint == load_model(tmp_path / "text").fingerprint
    write_tensors(tmp_path / "whole", {**text, "audio_tower.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"audio_tower.weight has no place") as caught:
        load_model(tmp_path / "whole")
    assert caught.value.reason == "EXTRA_TENSOR"
    blind = write_checkpoint(tmp_path / "v3", TINY_CONFIGS["v3"])
    write_tensors(tmp_path / "v3", {**blind, **others})
    with pytest.raises(CheckpointError, match=r"(vision_tower|mm_projector).* has no place"):
        load_model(tmp_path / "v3")
