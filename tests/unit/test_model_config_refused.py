"""A config.json that can't be computed, or makes no sense, is refused by name; what is not used is not judged."""

from __future__ import annotations

import json

import pytest
from headrace_core.errors import CheckpointError
from headrace_core.families.config_json import parse_config
from headrace_core.request import MAX_COUNT, MAX_EOS_TOKEN_IDS
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS


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
def test_what_is_not_computed_is_refused_by_name(read_config, name, changes, field):
    with pytest.raises(CheckpointError, match=field) as caught:
        read_config(TINY_CONFIGS[name], **changes)
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
def test_what_makes_no_sense_is_refused_by_name(read_config, name, changes, field):
    with pytest.raises(CheckpointError, match=field) as caught:
        read_config(TINY_CONFIGS[name], **changes)
    assert caught.value.reason == "BAD_CONFIG"
    assert len(str(caught.value)) < 500


def test_the_limits_of_a_config_are_those_of_the_router(read_config):
    config = read_config(
        TINY_CONFIGS["v3"], vocab_size=2000, max_position_embeddings=2**31 - 1, eos_token_id=[*range(1024)] * 2
    )
    assert (config.max_context_tokens, len(config.eos_token_ids)) == (2**31 - 1, 1024)
    assert (MAX_COUNT, MAX_EOS_TOKEN_IDS) == (2**31 - 1, 1024)


@pytest.mark.parametrize("bos", [-1, [0], "<s>", 10**9])
def test_what_is_not_used_is_not_judged(read_config, bos):
    assert read_config(TINY_CONFIGS["v3"], bos_token_id=bos) == read_config(TINY_CONFIGS["v3"])


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
