"""Loading: every refusal by name and before any tensor is read; fingerprint, progress, memory."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from dataclasses import replace

import psutil
import pytest
import torch
from headrace_core.checkpoint import memory
from headrace_core.checkpoint.config_json import parse_config
from headrace_core.checkpoint.safetensors_file import StoredTensor, read_headers
from headrace_core.checkpoint.weight_reader import WeightReader
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import CheckpointError
from headrace_core.kv.layout import CacheDtype
from headrace_core.model.load import load_model
from headrace_core.model.working_memory import StepLimits
from headrace_core.testing.tiny_checkpoints import (
    TINY_CONFIGS,
    Variation,
    write_checkpoint,
    write_config,
    write_tensors,
)
from headrace_core.transfer.memfd import map_sealed
from headrace_core.worker.loading import load_worker_model
from safetensors.torch import load_file, save_file

CONFIG = {**TINY_CONFIGS["v3"], "num_hidden_layers": 2}
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def written(tmp_path):
    return write_checkpoint(tmp_path, CONFIG)


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Load, expecting a refusal that came before any tensor was read."""

    def refuse(reason, match):
        def read(self):
            pytest.fail(f"{self.name} was read")

        monkeypatch.setattr(StoredTensor, "read", read)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_model(tmp_path)
        assert caught.value.reason == reason
        assert len(str(caught.value)) > 40, "the message says what to do"

    return refuse


def test_a_missing_tensor_is_named(tmp_path, written, refusal):
    del written[NORM]
    write_tensors(tmp_path, written)
    refusal("MISSING_TENSOR", NORM)


def test_a_tensor_without_a_place_is_named(tmp_path, written, refusal):
    written["model.layers.2.input_layernorm.weight"] = torch.ones(32)
    write_tensors(tmp_path, written)
    refusal("EXTRA_TENSOR", "model.layers.2.input_layernorm.weight")


def test_a_misshapen_tensor_is_named(tmp_path, written, refusal):
    written[NORM] = torch.ones(31)
    write_tensors(tmp_path, written)
    refusal("BAD_TENSOR_SHAPE", rf"{NORM} is \[31\].*\[32\]")


def test_an_integer_tensor_is_named(tmp_path, written, refusal):
    written[NORM] = torch.ones(32, dtype=torch.int64)
    write_tensors(tmp_path, written)
    refusal("UNSUPPORTED_MODEL", NORM)


def test_fp8_without_a_description_of_blocks_is_refused(tmp_path, written, refusal):
    name = "model.layers.0.self_attn.o_proj.weight"
    written[name] = written[name].to(torch.float8_e4m3fn)
    write_tensors(tmp_path, written)
    refusal("UNSUPPORTED_MODEL", name)


def test_fp8_without_its_scale_is_refused(tmp_path, written, refusal):
    name = "model.layers.0.self_attn.o_proj.weight"
    written[name] = written[name].to(torch.float8_e4m3fn)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write_config(tmp_path, {**CONFIG, "quantization_config": quantisation})
    write_tensors(tmp_path, written)
    refusal("MISSING_TENSOR", name + "_scale_inv")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, written, refusal, kept):
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refusal("DAMAGED_FILE", "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, written, refusal, header):
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    refusal("DAMAGED_FILE", "model.safetensors")


def rewrite_header(path, change):
    """Let `change` work on the header of a safetensors file, as an object."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def test_tensors_that_overlap_and_leave_a_hole_of_the_same_size_are_refused(tmp_path, written, refusal):
    def move(header):
        header[NORM]["data_offsets"] = header["model.norm.weight"]["data_offsets"]

    rewrite_header(tmp_path / "model.safetensors", move)
    refusal("DAMAGED_FILE", r"model\.safetensors: tensor .* begins at byte \d+; tensor .* ends at \d+")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [32.0]),
        ("shape", [True]),
        ("shape", "32"),
        ("shape", {"32": 1}),
        ("shape", [10**400, 0]),
        ("shape", [1] * 1_000_000),
        ("data_offsets", [0.0, 128.0]),
        ("data_offsets", [False, 128]),
        ("data_offsets", [10**4000, 10**4000 + 128]),
        ("data_offsets", "ab"),
        ("dtype", ["F32"]),
        ("dtype", None),
    ],
)
def test_numbers_that_are_no_sizes_are_refused_by_name(tmp_path, written, refusal, field, value):
    rewrite_header(tmp_path / "model.safetensors", lambda header: header[NORM].update({field: value}))
    refusal("DAMAGED_FILE", rf"model\.safetensors: its entry for tensor {NORM}")


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_theta": 1e-300}, "rope_theta 1e-300"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta 1.0"),
        ({"rope_scaling": {**YARN, "factor": 1e-300}}, "factor 1e-300"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast -1"),
        ({"rope_scaling": {**YARN, "beta_slow": 1e-320}}, "beta_slow"),
        ({"rope_scaling": {**YARN, "mscale": 3e38, "mscale_all_dim": 1e-30}}, "mscale 3e.38"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1e38}}, "mscale_all_dim 1e.38"),
        ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": -10 / math.log(4.0)}}, "mscale_all_dim -7"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor 0"),
        ({"rope_scaling": {**YARN, "attention_factor": 3e38}}, "attention_factor 3e.38"),
    ],
)
def test_angles_that_are_no_use_are_refused_with_the_fields_they_follow_from(
    tmp_path, written, refusal, changes, field
):
    write_config(tmp_path, {**CONFIG, **changes})
    refusal("BAD_CONFIG", field)


def test_a_worker_tries_its_network_before_it_serves(tmp_path, written):
    write_config(tmp_path, {**CONFIG, "routed_scaling_factor": 3e38})
    with pytest.raises(CheckpointError, match=r"logits .* are not all finite") as caught:
        load_worker_model(DecodeSettings(model=tmp_path, kv_pool_mib=1))
    assert caught.value.reason == "BAD_LOGITS"


def test_what_a_worker_tries_its_network_with_leaves_nothing_behind(tmp_path, written):
    loaded = load_worker_model(DecodeSettings(model=tmp_path, kv_pool_mib=1))
    assert not any(layer.any() for layer in loaded.cache.layers)
    assert not any(map(any, loaded.model.take_expert_counts().values()))


@pytest.mark.parametrize("settings", [PrefillSettings, DecodeSettings])
def test_either_worker_has_a_pool_that_its_transports_can_read(tmp_path, written, settings):
    """A decode worker holds pages, too: those of its prefix cache."""
    shared, plain = (load_worker_model(settings(model=tmp_path, kv_pool_mib=1, transport=it)) for it in ("shm", "grpc"))
    assert shared.memory is not None
    assert plain.memory is None
    pages, _ = map_sealed(shared.memory.descriptor)
    shared.cache.page_bytes(1, 2)[:4] = b"seen"
    start = shared.memory.layer_stride + 2 * shared.layout.page_layer_bytes
    assert bytes(pages[start : start + 4]) == b"seen"


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


def test_a_model_too_large_is_refused_with_the_figures(tmp_path, written, refusal, monkeypatch):
    monkeypatch.setattr("headrace_core.model.load.available_bytes", lambda device: 100 << 20)
    refusal("MODEL_TOO_LARGE", r"weights \d+, KV pool 0.*100 MiB are available")


def test_what_a_step_needs_counts_on_a_gpu(tmp_path, written, monkeypatch):
    monkeypatch.setattr("headrace_core.model.load.available_bytes", lambda device: 2 << 30)
    with pytest.raises(CheckpointError, match=r"working margin \d{5,}\).*--max-step-tokens") as caught:
        load_model(tmp_path, device="cuda", step_limits=StepLimits(max_step_tokens=10_000_000))
    assert caught.value.reason == "MODEL_TOO_LARGE"


def test_the_kv_pool_counts(tmp_path, written):
    with pytest.raises(CheckpointError, match="KV pool 1073741824") as caught:
        load_model(tmp_path, kv_pool_bytes=1 << 50)
    assert caught.value.reason == "MODEL_TOO_LARGE"


def test_a_control_group_limits_what_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP_V2", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP_V1", tmp_path / "none")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert memory.available_bytes() > 1 << 20, "no limit"
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_bytes() == 300
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert memory.available_bytes() == 500
    assert memory.available_bytes() <= psutil.virtual_memory().total


def test_tied_embeddings_need_no_head_and_refuse_another(tmp_path):
    tensors = write_checkpoint(tmp_path, {**CONFIG, "tie_word_embeddings": True})
    assert "lm_head.weight" not in tensors
    load_model(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path, tensors)
    load_model(tmp_path)
    tensors["lm_head.weight"][3, 4] += 1
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="tie_word_embeddings") as caught:
        load_model(tmp_path)
    assert caught.value.reason == "BAD_CONFIG"


def test_fingerprint_changes_with_weights_config_and_compute_type_only(tmp_path, written):
    first = load_model(tmp_path).fingerprint
    assert len(first) == 32
    write_tensors(tmp_path, dict(reversed(written.items())))
    assert load_model(tmp_path).fingerprint == first, "the order in the file does not matter"
    assert load_model(tmp_path, dtype="bfloat16").fingerprint != first
    write_config(tmp_path, {**CONFIG, "transformers_version": "9"})
    assert load_model(tmp_path).fingerprint == first, "nor do fields that are not used"
    write_config(tmp_path, {**CONFIG, "rope_theta": 10001.0})
    assert load_model(tmp_path).fingerprint != first
    write_config(tmp_path, CONFIG)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"temperature": 0.3}')
    assert load_model(tmp_path).fingerprint == first
    generation.write_text('{"eos_token_id": [1, 18]}')
    assert load_model(tmp_path).fingerprint != first, "workers that end elsewhere don't work together"
    generation.unlink()
    written[NORM][3] += 1e-3
    write_tensors(tmp_path, written)
    assert load_model(tmp_path).fingerprint != first


def test_progress_reaches_the_end(tmp_path):
    tensors = write_checkpoint(tmp_path, CONFIG, Variation(num_shards=2))
    seen: list[tuple[int, int]] = []
    model = load_model(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(tensors)
    assert seen[-1] == (total, total)
    assert model.weight_bytes == total


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_compute_type_is_the_caches(tmp_path, dtype, expected, written):
    model = load_model(tmp_path, dtype=dtype)
    assert model.dtype == getattr(torch, expected)
    assert model.kv_layout(8).dtype == CacheDtype(expected)
    assert model.kv_layout(8).num_layers == 2
