"""Loading: every refusal by name and before any tensor is read; fingerprint, progress, memory."""

from __future__ import annotations

import json
import math

import psutil
import pytest
import torch
from headrace_core.checkpoint import memory
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

CONFIG = {**TINY_CONFIGS["v3"], "num_hidden_layers": 2}
NORM = "model.layers.1.input_layernorm.weight"


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
