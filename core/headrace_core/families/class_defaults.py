"""What a config.json means that leaves fields out: the defaults of transformers' class of that model type.

Only of fields that are read and have no default where they are parsed. A field that is null is not left out. A model
type whose class is its authors' own code (`kimi_k2`) has none here: what it leaves out is refused by name.
Source: transformers 5.23 DeepseekV3Config, DeepseekV2Config, MixtralConfig.
"""

from __future__ import annotations

CLASS_DEFAULTS: dict[str, dict[str, int | float]] = {
    "deepseek_v3": {
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
        "eos_token_id": 1,
    },
    "deepseek_v2": {
        "vocab_size": 102_400,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
    },
    "mixtral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "max_position_embeddings": 131_072,
        "eos_token_id": 2,
    },
}
"""By `model_type`, then by field."""
