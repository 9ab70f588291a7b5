"""config.json: as published, with old and new spellings that mean the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headrace_core.errors import CheckpointError
from headrace_core.families.config import GqaShape, IndexerShape, MlaShape
from headrace_core.kv.layout import CacheDtype, KeyValueAttention, LatentAttention
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS

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


def test_v2_lite_is_read_as_published(read_config):
    config = read_config(V2_LITE)
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


def test_kimi_k2_is_deepseek_v3_by_another_name(read_config):
    assert read_config(TINY_CONFIGS["v3"], model_type="kimi_k2").family == "deepseek_v3"


def test_mixtral_head_dim_follows_from_hidden_size_unless_given(read_config):
    assert read_config(TINY_CONFIGS["mixtral"]).attention == GqaShape(2, 8)
    config = read_config(TINY_CONFIGS["mixtral"], head_dim=24)
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


def test_qwen3_30b_is_read_as_published(read_config):
    config = read_config(QWEN3_30B)
    assert (config.family, config.attention) == ("qwen3_moe", GqaShape(4, 128, has_head_norms=True))
    assert (config.moe.num_experts, config.moe.num_experts_per_token, config.moe.is_normalised) == (128, 8, True)
    assert all(config.is_moe_layer(layer) for layer in range(48))
    assert (config.rope.theta, config.max_context_tokens, config.eos_token_ids) == (1e6, 40_960, (151_645,))


def test_qwen3s_layers_with_experts_are_every_so_many_th_but_those_named(read_config):
    config = read_config(QWEN3_30B, decoder_sparse_step=3, mlp_only_layers=[5, 5, 99], num_hidden_layers=12)
    assert [layer for layer in range(12) if config.is_moe_layer(layer)] == [2, 8, 11]


def test_qwen3s_window_counts_only_where_it_is_used(read_config):
    assert read_config(QWEN3_30B, sliding_window=4096) == read_config(QWEN3_30B)
    assert read_config(QWEN3_30B, use_sliding_window=True, sliding_window=None) == read_config(QWEN3_30B)


def test_qwen3s_experts_are_counted_under_either_name(read_config):
    theirs = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    assert read_config(theirs, num_local_experts=128) == read_config(QWEN3_30B)


def test_kimi_k25s_text_part_is_deepseek_v3(read_config):
    text = {**TINY_CONFIGS["v3"], "model_type": "kimi_k2", "eos_token_id": 7}
    config = read_config(TINY_CONFIGS["kimi-k25"], text_config=text, eos_token_id=3)
    assert replace(config, family="deepseek_v3") == read_config(text)


def test_old_and_new_spellings_of_rope_agree(read_config):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}
    old = read_config(TINY_CONFIGS["v3"], rope_theta=500.0, rope_scaling={"type": "yarn", **yarn})
    base = {k: v for k, v in TINY_CONFIGS["v3"].items() if not k.startswith("rope_")}
    new = read_config(base, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **yarn})
    assert old.rope == new.rope
    assert read_config(base).rope.theta == 10000.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({}, "bfloat16"),
    ],
)
def test_dtype_in_either_spelling(read_config, fields, expected):
    base = {k: v for k, v in TINY_CONFIGS["v3"].items() if k != "torch_dtype"}
    assert read_config({**base, **fields}).checkpoint_dtype == expected


def test_no_shared_experts_may_be_said_with_null(read_config):
    assert read_config(TINY_CONFIGS["v3"], n_shared_experts=None).moe.num_shared_experts == 0


def test_every_second_layer_may_have_experts(read_config):
    config = read_config(TINY_CONFIGS["v3"], moe_layer_freq=2, num_hidden_layers=5)
    assert [config.is_moe_layer(layer) for layer in range(5)] == [False, False, True, False, True]


def test_null_is_false_and_no_default(read_config):
    assert read_config(TINY_CONFIGS["v3"], norm_topk_prob=None).moe.is_normalised is False
    assert read_config(TINY_CONFIGS["v3"], rope_interleave=None).attention.is_rope_interleaved is False


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


def test_deepseek_v32_is_v3_with_an_indexer(read_config):
    config = read_config(DEEPSEEK_V32)
    assert config.attention.indexer == IndexerShape(num_heads=64, head_dim=128, top_k=2048)
    assert (config.is_attention_sparse, config.rope.yarn.factor, config.moe.num_first_dense_layers) == (True, 40.0, 3)
    dense = replace(config, family="deepseek_v3", attention=replace(config.attention, indexer=None))
    assert dense == read_config({**DEEPSEEK_V32, "model_type": "deepseek_v3"})
    assert read_config(DEEPSEEK_V32, mlp_layer_types=["dense"] * 3 + ["sparse"] * 58) == config


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
def test_an_indexer_that_can_not_be_is_refused_by_name(read_config, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(DEEPSEEK_V32, **change)
