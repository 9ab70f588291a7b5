"""Mixtral: grouped-query attention, experts in every layer."""

from __future__ import annotations

from headrace_core.families.common_fields import checked_moe, parse_common, parse_rope
from headrace_core.families.config import GqaShape, ModelConfig, MoeShape
from headrace_core.families.fields import Fields, bad, unsupported


def parse_mixtral(fields: Fields) -> ModelConfig:
    """Return the network that config.json describes. Raises CheckpointError by field."""
    if "quantization_config" in fields:
        unsupported("quantization_config", fields.raw("quantization_config"), "null for mixtral")
    num_heads, hidden_size = fields.count("num_attention_heads"), fields.count("hidden_size")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        bad("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    if "head_dim" not in fields and hidden_size % num_heads:
        bad("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}, or head_dim given")
    head_dim = fields.count("head_dim", hidden_size // num_heads, least=2)
    moe = MoeShape(
        num_experts=fields.count("num_local_experts"),
        num_experts_per_token=fields.count("num_experts_per_tok", 2),
        intermediate_size=fields.count("intermediate_size"),
        num_shared_experts=0,
        num_first_dense_layers=0,
        layer_stride=1,
        scoring="softmax",
        num_groups=1,
        num_groups_kept=1,
        is_group_score_top2=False,
        is_normalised=True,
        scaling_factor=1.0,
        has_correction_bias=False,
    )
    return ModelConfig(
        family="mixtral",
        dense_intermediate_size=fields.count("intermediate_size"),
        has_attention_bias=False,
        attention=GqaShape(num_kv_heads, head_dim),
        rope=parse_rope(fields, head_dim, default_theta=1_000_000.0),
        moe=checked_moe(moe),
        num_heads=num_heads,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5),
        **parse_common(fields),
    )
