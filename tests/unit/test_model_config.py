"""config.json: old and new spellings mean the same; what can't be computed is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from headrace_core.errors import CheckpointError
from headrace_core.families.config import GqaShape, IndexerShape, MlaShape
from headrace_core.families.config_json import parse_config
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, LatentAttention
from headrace_core.request import MAX_COUNT, MAX_EOS_TOKEN_IDS
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_config

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


@pytest.fixture
def read(tmp_path):
    def read(config, **changes):
        write_config(tmp_path, {**config, **changes})
        return parse_config(tmp_path)

    return read


def test_v2_lite_is_read_as_published(read):
    config = read(V2_LITE)
    assert config.family == "deepseek_v2"
    assert config.attention == MlaShape(None, 512, 128, 64, 128, is_rope_interleaved=True)
    assert (config.moe.num_experts, config.moe.num_experts_per_token) == (64, 6)
    assert config.eos_token_ids == (100001,)
    assert config.rope.yarn is not None
    assert config.rope.yarn.factor == 40
    assert [layer for layer in range(27) if not config.is_moe_layer(layer)] == [0]
    layout = config.kv_layout(64, CacheDtype.BFLOAT16)
    assert layout.attention == LatentAttention(512, 64)
    assert layout.page_layer_bytes == 64 * 576 * 2


def test_kimi_k2_is_deepseek_v3_by_another_name(read):
    assert read(TINY_CONFIGS["v3"], model_type="kimi_k2").family == "deepseek_v3"


def test_mixtral_head_dim_follows_from_hidden_size_unless_given(read):
    assert read(TINY_CONFIGS["mixtral"]).attention == GqaShape(2, 8)
    config = read(TINY_CONFIGS["mixtral"], head_dim=24)
    assert config.kv_layout(4, CacheDtype.FLOAT32).attention == KeyValueAttention(2, 24)


QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_qwen3_30b_is_read_as_published(read):
    config = read(QWEN3_30B)
    assert (config.family, config.attention) == ("qwen3_moe", GqaShape(4, 128, has_head_norms=True))
    assert (config.moe.num_experts, config.moe.num_experts_per_token, config.moe.is_normalised) == (128, 8, True)
    assert all(config.is_moe_layer(layer) for layer in range(48))
    assert (config.rope.theta, config.max_context_tokens, config.eos_token_ids) == (1e6, 40_960, (151_645,))


def test_qwen3s_layers_with_experts_are_every_so_many_th_but_those_named(read):
    config = read(QWEN3_30B, decoder_sparse_step=3, mlp_only_layers=[5, 5, 99], num_hidden_layers=12)
    assert [layer for layer in range(12) if config.is_moe_layer(layer)] == [2, 8, 11]


def test_qwen3s_window_counts_only_where_it_is_used(read):
    assert read(QWEN3_30B, sliding_window=4096) == read(QWEN3_30B)
    assert read(QWEN3_30B, use_sliding_window=True, sliding_window=None) == read(QWEN3_30B)


def test_qwen3s_experts_are_counted_under_either_name(read):
    theirs = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    assert read(theirs, num_local_experts=128) == read(QWEN3_30B)


def test_kimi_k25s_text_part_is_deepseek_v3(read):
    text = {**TINY_CONFIGS["v3"], "model_type": "kimi_k2", "eos_token_id": 7}
    config = read(TINY_CONFIGS["kimi-k25"], text_config=text, eos_token_id=3)
    assert replace(config, family="deepseek_v3") == read(text)


def test_old_and_new_spellings_of_rope_agree(read):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}
    old = read(TINY_CONFIGS["v3"], rope_theta=500.0, rope_scaling={"type": "yarn", **yarn})
    base = {k: v for k, v in TINY_CONFIGS["v3"].items() if not k.startswith("rope_")}
    new = read(base, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **yarn})
    assert old.rope == new.rope
    assert read(base).rope.theta == 10000.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({}, "bfloat16"),
    ],
)
def test_dtype_in_either_spelling(read, fields, expected):
    base = {k: v for k, v in TINY_CONFIGS["v3"].items() if k != "torch_dtype"}
    assert read({**base, **fields}).checkpoint_dtype == expected


@pytest.mark.parametrize(("eos", "expected"), [(1, (1,)), ([1, 5], (1, 5)), (None, ())])
def test_end_of_sequence_is_one_token_several_or_none(read, eos, expected):
    assert read(TINY_CONFIGS["v3"], eos_token_id=eos).eos_token_ids == expected


@pytest.fixture
def read_with(tmp_path):
    """Read config.json with `eos_token_id` 7, and generation_config.json of the text or the values given."""

    def read_with(generation):
        write_config(tmp_path, {**TINY_CONFIGS["v3"], "eos_token_id": 7})
        text = generation if isinstance(generation, bytes) else json.dumps(generation).encode()
        (tmp_path / "generation_config.json").write_bytes(text)
        return parse_config(tmp_path)

    return read_with


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 18}, (18,)),
        ({"eos_token_id": [1, 18]}, (1, 18)),
        ({"eos_token_id": [18, 1, 18]}, (18, 1)),
        ({"eos_token_id": []}, ()),
        ({"eos_token_id": None}, (7,)),
        ({"temperature": 0.6}, (7,)),
        ({}, (7,)),
    ],
)
def test_the_ends_that_generation_config_names_replace_those_of_config(read_with, generation, expected):
    assert read_with(generation).eos_token_ids == expected


@pytest.mark.parametrize("eos", [160, -1, [1, 160], True, [True], 1.0, "1", {"id": 1}, [[1]]])
def test_an_end_that_is_no_token_is_refused_by_file_and_field(read, read_with, tmp_path, eos):
    for read_it, file in ((lambda: read_with({"eos_token_id": eos}), "generation_config"), (
        lambda: read({**TINY_CONFIGS["v3"], "eos_token_id": eos}), "config",
    )):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"^{file}\.json: eos_token_id is ") as caught:
            read_it()
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        assert caught.value.reason == "BAD_CONFIG"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b'"eos"', b"[" * 100_000])
def test_a_generation_config_that_is_no_json_object_is_refused(read_with, content):
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        read_with(content)
    assert caught.value.reason == "BAD_CONFIG"


def test_a_link_to_a_generation_config_that_is_gone_is_refused(tmp_path):
    write_config(tmp_path, TINY_CONFIGS["v3"])
    (tmp_path / "generation_config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        parse_config(tmp_path)


def test_no_shared_experts_may_be_said_with_null(read):
    assert read(TINY_CONFIGS["v3"], n_shared_experts=None).moe.num_shared_experts == 0


def test_every_second_layer_may_have_experts(read):
    config = read(TINY_CONFIGS["v3"], moe_layer_freq=2, num_hidden_layers=5)
    assert [config.is_moe_layer(layer) for layer in range(5)] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("v3", {"model_type": "llama"}, "model_type"),
        ("v3", {"hidden_act": "gelu"}, "hidden_act"),
        ("v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("v3", {"topk_method": "greedy"}, "topk_method"),
        ("v3", {"dtype": "int8"}, "dtype"),
        ("v3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("v3", {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ("v3", {"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
        ("v3", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ("v3", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [True, True]}}, "weight_block"),
        ("v3", {"v_head_dim": 64}, "v_head_dim"),
        ("v3", {"sliding_window": 64}, "sliding_window"),
        ("v2", {"sliding_window": 64}, "sliding_window"),
        ("v3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mixtral", {"layer_types": "sliding_attention"}, "layer_types"),
        ("v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("v2", {"mlp_bias": True}, "mlp_bias"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("glm4-moe-lite", {"scoring_func": "softmax"}, "scoring_func"),
        ("glm4-moe-lite", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("glm4-moe-lite", {"sliding_window": 64}, "sliding_window"),
        ("glm4-moe-lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("glm4-moe-lite", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type"),
        ("kimi-k25", {"text_config": {**TINY_CONFIGS["v3"], "model_type": "llama"}}, "text_config.model_type"),
        ("kimi-k25", {"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config"),
        (
            "kimi-k25",
            {"text_config": {**TINY_CONFIGS["v3"], "quantization_config": {"quant_method": "compressed-tensors"}}},
            "text_config.quantization_config.quant_method",
        ),
        ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ("qwen3-moe", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("qwen3-moe", {"attention_bias": True}, "attention_bias"),
        ("qwen3-moe", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3-moe", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("qwen3-moe", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type"),
        ("qwen3-moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3-moe", {"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ("qwen3-moe", {"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(read, name, changes, field):
    with pytest.raises(CheckpointError, match=field) as caught:
        read(TINY_CONFIGS[name], **changes)
    assert caught.value.reason == "UNSUPPORTED_MODEL"


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("v3", {"vocab_size": 0}, "vocab_size"),
        ("v3", {"vocab_size": "160"}, "vocab_size"),
        ("v3", {"hidden_size": None}, "hidden_size"),
        ("v3", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("v3", {"rms_norm_eps": True}, "rms_norm_eps"),
        ("v3", {"attention_bias": "no"}, "attention_bias"),
        ("v3", {"model_type": 3}, "model_type"),
        ("v3", {"eos_token_id": 160}, "eos_token_id"),
        ("v3", {"n_group": 3}, "n_group"),
        ("v3", {"n_group": 8}, "n_group"),
        ("v3", {"topk_group": 5}, "topk_group"),
        ("v3", {"topk_group": 1}, "num_experts_per_tok"),
        ("v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("v3", {"qk_rope_head_dim": 7}, "rotary"),
        ("v3", {"rope_scaling": {"type": "yarn"}}, "factor"),
        ("v3", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("v3", {"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ("v3", {"routed_scaling_factor": 1e300}, "routed_scaling_factor"),
        ("v3", {"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
        ("v3", {"max_position_embeddings": 2**31}, "max_position_embeddings"),
        ("v3", {"max_position_embeddings": 1}, "max_position_embeddings"),
        ("v3", {"hidden_size": 10**400}, "hidden_size"),
        ("v3", {"vocab_size": 2000, "eos_token_id": list(range(1025))}, "eos_token_id"),
        ("v3", {"rope_scaling": "yarn"}, "rope_scaling"),
        ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("mixtral", {"hidden_size": 30}, "hidden_size"),
        ("glm4-moe-lite", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
        ("glm4-moe-lite", {"mlp_layer_types": ["dense", "sparse", "moe"]}, "mlp_layer_types"),
        ("glm4-moe-lite", {"mlp_layer_types": ["dense", "sparse", "dense"]}, "first_k_dense_replace"),
        ("glm4-moe-lite", {"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ("kimi-k25", {"text_config": None}, "text_config"),
        ("kimi-k25", {"text_config": []}, "text_config"),
        ("kimi-k25", {"text_config": {**TINY_CONFIGS["v3"], "n_group": 3}}, "n_group"),
        ("kimi-k25", {"text_config": {**TINY_CONFIGS["v3"], "vocab_size": 0}}, "text_config.vocab_size"),
        ("qwen3-moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("qwen3-moe", {"mlp_only_layers": [1, "2"]}, "mlp_only_layers"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3-moe", {"num_experts": 0}, "num_experts"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("qwen3-moe", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("qwen3-moe", {"head_dim": 7}, "rotary"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(read, name, changes, field):
    with pytest.raises(CheckpointError, match=field) as caught:
        read(TINY_CONFIGS[name], **changes)
    assert caught.value.reason == "BAD_CONFIG"
    assert len(str(caught.value)) < 500


def test_the_limits_of_a_config_are_those_of_the_router(read):
    config = read(
        TINY_CONFIGS["v3"], vocab_size=2000, max_position_embeddings=2**31 - 1, eos_token_id=[*range(1024)] * 2
    )
    assert (config.max_context_tokens, len(config.eos_token_ids)) == (2**31 - 1, 1024)
    assert (MAX_COUNT, MAX_EOS_TOKEN_IDS) == (2**31 - 1, 1024)


def test_null_is_false_and_no_default(read):
    assert read(TINY_CONFIGS["v3"], norm_topk_prob=None).moe.is_normalised is False
    assert read(TINY_CONFIGS["v3"], rope_interleave=None).attention.is_rope_interleaved is False


@pytest.mark.parametrize("bos", [-1, [0], "<s>", 10**9])
def test_what_is_not_used_is_not_judged(read, bos):
    assert read(TINY_CONFIGS["v3"], bos_token_id=bos) == read(TINY_CONFIGS["v3"])


def test_the_ends_of_config_are_not_judged_where_others_replace_them(tmp_path):
    write_config(tmp_path, {**TINY_CONFIGS["v3"], "eos_token_id": -1})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 18}')
    assert parse_config(tmp_path).eos_token_ids == (18,)


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        parse_config(tmp_path)
    assert caught.value.reason == "BAD_CONFIG"


def test_a_missing_field_is_named(tmp_path):
    config = {k: v for k, v in TINY_CONFIGS["v3"].items() if k != "kv_lora_rank"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    with pytest.raises(CheckpointError, match="kv_lora_rank is missing"):
        parse_config(tmp_path)


DEEPSEEK_V32 = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip


def test_deepseek_v32_is_v3_with_an_indexer(read):
    config = read(DEEPSEEK_V32)
    assert config.attention.indexer == IndexerShape(num_heads=64, head_dim=128, top_k=2048)
    assert (config.is_attention_sparse, config.rope.yarn.factor, config.moe.num_first_dense_layers) == (True, 40.0, 3)
    dense = replace(config, family="deepseek_v3", attention=replace(config.attention, indexer=None))
    assert dense == read({**DEEPSEEK_V32, "model_type": "deepseek_v3"})
    assert read(DEEPSEEK_V32, mlp_layer_types=["dense"] * 3 + ["sparse"] * 58) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_topk": 0}, "index_topk is 0; it must be a whole number"),
        ({"index_head_dim": 32}, "index_head_dim is 32; it must be at least qk_rope_head_dim, 64"),
        ({"q_lora_rank": None}, "q_lora_rank is None; it must be a whole number: the indexer's queries"),
        ({"rope_interleave": False}, "rope_interleave is False; Headrace supports true for deepseek_v32"),
        ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types is .*; Headrace supports 3 times dense, then sparse"),
    ],
)
def test_an_indexer_that_can_not_be_is_refused_by_name(read, change, message):
    with pytest.raises(CheckpointError, match=message):
        read(DEEPSEEK_V32, **change)
