"""DeepSeek-V3 and V2: latent attention, experts of which some are shared."""

from __future__ import annotations

from typing import Any

from headrace_core.families.common_fields import checked_moe, parse_common, parse_fp8_block, parse_rope
from headrace_core.families.config import MlaShape, ModelConfig, MoeShape
from headrace_core.families.fields import Fields, bad, unsupported


def parse_deepseek(fields: Fields, family: str) -> ModelConfig:
    """Return the network that config.json describes. Raises CheckpointError by field."""
    is_v3 = family == "deepseek_v3"
    fields.only("mlp_bias", False, default=False)
    attention = MlaShape(
        q_lora_rank=fields.count("q_lora_rank") if "q_lora_rank" in fields else None,
        kv_lora_rank=fields.count("kv_lora_rank"),
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=fields.count("qk_rope_head_dim", least=2),
        value_dim=fields.count("v_head_dim"),
        is_rope_interleaved=fields.flag("rope_interleave", True) if is_v3 else True,
    )
    num_heads = fields.count("num_attention_heads")
    if fields.count("num_key_value_heads", num_heads) != num_heads:
        bad("num_key_value_heads", fields.raw("num_key_value_heads"), "num_attention_heads with latent attention")
    if attention.value_dim > attention.nope_dim + attention.rope_dim:
        unsupported("v_head_dim", attention.value_dim, "at most qk_nope_head_dim + qk_rope_head_dim")
    moe = _parse_v3_moe(fields) if is_v3 else _parse_v2_moe(fields)
    return ModelConfig(
        family="deepseek_v3" if is_v3 else "deepseek_v2",
        dense_intermediate_size=fields.count("intermediate_size"),
        has_attention_bias=fields.flag("attention_bias", False),
        attention=attention,
        rope=parse_rope(fields, attention.rope_dim, default_theta=10_000.0),
        moe=moe,
        num_heads=num_heads,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        num_mtp_layers=fields.count("num_nextn_predict_layers", 0, least=0),
        fp8_block=parse_fp8_block(fields),
        **parse_common(fields),
    )


def _parse_v3_moe(fields: Fields) -> MoeShape:
    fields.only("topk_method", "noaux_tc", default="noaux_tc")
    fields.only("scoring_func", "sigmoid", default="sigmoid")
    num_experts = fields.count("n_routed_experts")
    num_groups = fields.count("n_group")
    if num_groups > 1 and num_experts // num_groups < 2:
        bad("n_group", num_groups, f"at most half of n_routed_experts, {num_experts}")
    return checked_moe(
        MoeShape(
            scoring="sigmoid",
            num_groups=num_groups,
            num_groups_kept=fields.count("topk_group"),
            is_group_score_top2=True,
            is_normalised=fields.flag("norm_topk_prob", True),
            scaling_factor=fields.number("routed_scaling_factor"),
            has_correction_bias=True,
            **_parse_deepseek_experts(fields),
        )
    )


def _parse_v2_moe(fields: Fields) -> MoeShape:
    fields.only("scoring_func", "softmax", default="softmax")
    if fields.flag("norm_topk_prob", False):
        # transformers ignores it here, the model's own code drops the scaling factor with it.
        unsupported("norm_topk_prob", True, "false for deepseek_v2, where implementations disagree")
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        unsupported("topk_method", method, "greedy or group_limited_greedy for deepseek_v2")
    is_grouped = method == "group_limited_greedy"
    return checked_moe(
        MoeShape(
            scoring="softmax",
            num_groups=fields.count("n_group") if is_grouped else 1,
            num_groups_kept=fields.count("topk_group") if is_grouped else 1,
            is_group_score_top2=False,
            is_normalised=False,
            scaling_factor=fields.number("routed_scaling_factor", 1.0),
            has_correction_bias=False,
            **_parse_deepseek_experts(fields),
        )
    )


def _parse_deepseek_experts(fields: Fields) -> dict[str, Any]:
    return {
        "num_experts": fields.count("n_routed_experts"),
        "num_experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": fields.count("moe_intermediate_size"),
        "num_shared_experts": 0 if fields.is_null("n_shared_experts") else fields.count("n_shared_experts", least=0),
        "num_first_dense_layers": fields.count("first_k_dense_replace", least=0),
        "layer_stride": fields.count("moe_layer_freq", 1),
    }
