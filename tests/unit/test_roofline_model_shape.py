import dataclasses
import json
import math

import pytest
from headrace_core.families.config_json import parse_config
from headrace_core.families.roofline_shape import shape_of
from headrace_core.families.table import weights
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, KvLayout, LatentAttention
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.memory import kv_bytes_per_gpu, parameters, weight_bytes_per_gpu
from headrace_core.roofline.model_shape import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    MIXTRAL_8X7B,
    MODELS,
    Dtype,
    GqaShape,
    MlaShape,
    ModelShape,
    ModelShapeError,
    MoeShape,
)
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config

_DEMO = {
    "model_type": "deepseek_v3", "num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 6,
    "vocab_size": 1536, "intermediate_size": 512, "moe_intermediate_size": 96, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 96,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 6, "tie_word_embeddings": False,
}  # fmt: skip


def test_deepseek_v3_caches_70272_bytes_per_token():
    assert DEEPSEEK_V3.kv_bytes_per_token(Dtype.BF16) == 70_272
    assert DEEPSEEK_V3.kv_bytes_per_token(Dtype.FP8) == 61 * (512 + 4 * 4 + 64 * 2) == 40_016


def test_latent_is_57_times_smaller_than_keys_and_values_of_all_heads():
    keys_and_values = 2 * DEEPSEEK_V3.num_layers * DEEPSEEK_V3.num_heads * 128 * 2
    assert round(keys_and_values / DEEPSEEK_V3.kv_bytes_per_token()) == 57


def test_mixtral_caches_131072_bytes_per_token():
    assert MIXTRAL_8X7B.kv_bytes_per_token() == 131_072


def test_bytes_per_token_are_those_of_the_engines_layout():
    latent = KvLayout(DEEPSEEK_V2_LITE.num_layers, 64, CacheDtype.BFLOAT16, LatentAttention(512, 64))
    assert DEEPSEEK_V2_LITE.kv_bytes_per_token() == latent.token_bytes
    narrow = KvLayout(DEEPSEEK_V2_LITE.num_layers, 64, CacheDtype.FP8_E4M3, LatentAttention(512, 64))
    assert DEEPSEEK_V2_LITE.kv_bytes_per_token(Dtype.FP8) == narrow.token_bytes
    grouped = KvLayout(MIXTRAL_8X7B.num_layers, 64, CacheDtype.FLOAT32, KeyValueAttention(8, 128))
    assert MIXTRAL_8X7B.kv_bytes_per_token(Dtype.FP32) == grouped.token_bytes


@pytest.mark.parametrize(
    ("shape", "parallel", "gib"),
    [
        (DEEPSEEK_V3, Parallelism(tp=8), 68.6),
        (DEEPSEEK_V3, Parallelism(dp=8), 8.6),
        (MIXTRAL_8X7B, Parallelism(tp=8), 16.0),
        (MIXTRAL_8X7B, Parallelism(dp=8), 16.0),
    ],
)
def test_cache_of_256_sequences_of_4096_tokens_on_8_gpus(shape, parallel, gib):
    assert round(kv_bytes_per_gpu(shape, parallel, 256 * 4096) / 2**30, 1) == gib


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_what_the_shape_does(name, dtype):
    shape = MODELS[name]
    assert kv_bytes_per_gpu(shape, Parallelism(), 1, dtype) == shape.kv_bytes_per_token(dtype)


def test_a_short_latent_has_one_scale():
    small = MlaShape(0, 64, 32, 32, 32)
    assert small.cached_bytes_per_token(Dtype.FP8) == 64 + 4 + 64
    shape = dataclasses.replace(DEEPSEEK_V2_LITE, num_layers=3, attention=small)
    assert kv_bytes_per_gpu(shape, Parallelism(), 1, Dtype.FP8) == 3 * 132


def test_tensor_parallelism_beyond_the_kv_heads_divides_the_cache_no_further():
    assert kv_bytes_per_gpu(MIXTRAL_8X7B, Parallelism(tp=32), 1000) == 1000 * 131_072 / 8


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v3", 671.0), ("deepseek-v3.2", 671.9), ("deepseek-v2", 235.7),
        ("deepseek-v2-lite", 15.7), ("moonlight-16b", 16.0),
        ("kimi-k2", 1026.4), ("mixtral-8x7b", 46.7), ("qwen3-30b-a3b", 30.5), ("llama-3-8b", 8.0),
        ("llama-3-70b", 70.6),
        ("llama-3.1-405b", 405.8),
    ],
)  # fmt: skip
def test_parameters_are_as_published(name, billions):
    assert round(parameters(MODELS[name]) / 1e9, 1) == billions


def test_weights_of_all_ranks_are_at_least_the_models():
    whole = parameters(DEEPSEEK_V3)
    for parallel in (Parallelism(tp=8), Parallelism(dp=8, ep=8), Parallelism(tp=2, dp=4, ep=4)):
        assert parallel.num_gpus * parameters(DEEPSEEK_V3, parallel) > whole
    assert weight_bytes_per_gpu(DEEPSEEK_V3, Parallelism(dp=8, ep=8), Dtype.FP8) < 141e9


def test_config_of_a_checkpoint_is_read():
    assert ModelShape.from_config(_DEMO, "demo") == ModelShape(
        "demo", 4, 192, 6, 1536, 512, MlaShape(96, 64, 32, 32, 32), MoeShape(8, 2, 96, 96, 1)
    )


def test_a_folder_of_links_is_called_as_it_is(tmp_path):
    """The hub's cache is such a folder: its files are links to blobs."""
    blob = tmp_path / "blobs/1f2e"
    blob.parent.mkdir()
    blob.write_text(json.dumps(_DEMO))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(blob)
    assert ModelShape.load(snapshot).name == "snapshot"
    (tmp_path / "latest").symlink_to(snapshot)
    assert ModelShape.load(tmp_path / "latest").name == "latest"
    assert ModelShape.load(tmp_path / "latest/config.json").name == "latest"


def test_configs_of_other_families_are_read(tmp_path):
    mixtral = {
        "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32_000, "intermediate_size": 14_336, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    shape = ModelShape.load(tmp_path)
    assert shape.attention == GqaShape(8, 128)
    assert shape.moe == MIXTRAL_8X7B.moe
    assert parameters(shape) == parameters(MIXTRAL_8X7B)
    dense = ModelShape.from_config(
        {key: value for key, value in mixtral.items() if "expert" not in key and "key_value" not in key}
    )
    assert dense.moe is None
    assert dense.attention == GqaShape(32, 128)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_the_engines_networks_have_the_rooflines_shapes(name, tmp_path):
    """The engine's reading of a config.json, its weights and the roofline's reading are of one network."""
    write_config(tmp_path, TINY_CONFIGS[name])
    config = parse_config(tmp_path)
    shape = shape_of(config, "tiny")
    assert shape == ModelShape.from_config(TINY_CONFIGS[name], "tiny")
    # Norms, biases and correction biases are not counted.
    assert parameters(shape) == sum(math.prod(weight.shape) for weight in weights(config) if len(weight.shape) == 2)


def test_unusable_configs_are_refused_by_the_name_of_the_field(tmp_path):
    with pytest.raises(ModelShapeError, match="hidden_size"):
        ModelShape.from_config({**_DEMO, "hidden_size": None})
    with pytest.raises(ModelShapeError, match="num_hidden_layers must be at most"):
        ModelShape.from_config({**_DEMO, "num_hidden_layers": 10**12})
    with pytest.raises(ModelShapeError, match="v_head_dim"):
        ModelShape.from_config({**_DEMO, "v_head_dim": "32"})
    with pytest.raises(ModelShapeError, match="neither"):
        ModelShape.load(tmp_path / "none")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelShapeError, match="object"):
        ModelShape.load(tmp_path)
