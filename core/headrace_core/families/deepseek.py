"""DeepSeek-V3 and V2: latent attention, experts of which some are shared.

Source: transformers 5.23 DeepseekV3Config, DeepseekV2Config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headrace_core.families.common_fields import (
    checked_moe,
    parse_common,
    parse_fp8_block,
    parse_rope,
    refuse_windows,
)
from headrace_core.families.config import MlaShape, ModelConfig, MoeShape
from headrace_core.families.family import Family
from headrace_core.families.fields import Fields, bad, unsupported
from headrace_core.families.layers import decoder, feed_forward, indexer, latent_attention
from headrace_core.families.weights import Weight, WeightTree


def parse_v3(
    fields: Fields, num_first_dense_layers: int | None = None, layer_type: str = "full_attention"
) -> ModelConfig:
    """Return the network; `num_first_dense_layers` None: as `first_k_dense_replace` says. Raises CheckpointError."""
    if num_first_dense_layers is None:
        num_first_dense_layers = fields.count("first_k_dense_replace", least=0)
    attention = _parse_attention(fields, is_rope_interleaved=fields.flag("rope_interleave", True))
    return _parse(fields, "deepseek_v3", attention, _parse_v3_moe(fields, num_first_dense_layers), layer_type)


def _parse_v2(fields: Fields) -> ModelConfig:
    attention = _parse_attention(fields, is_rope_interleaved=True)
    return _parse(fields, "deepseek_v2", attention, _parse_v2_moe(fields))


def _parse(
    fields: Fields, family: str, attention: MlaShape, moe: MoeShape, layer_type: str = "full_attention"
) -> ModelConfig:
    refuse_windows(fields, layer_type)
    fields.only("mlp_bias", False, default=False)
    return ModelConfig(
        family=family,
        dense_intermediate_size=fields.count("intermediate_size"),
        has_attention_bias=fields.flag("attention_bias", False),
        attention=attention,
        rope=parse_rope(fields, attention.rope_dim, default_theta=10_000.0),
        moe=moe,
        num_heads=fields.count("num_attention_heads"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        num_mtp_layers=fields.count("num_nextn_predict_layers", 0, least=0),
        fp8_block=parse_fp8_block(fields),
        **parse_common(fields),
    )


def _parse_attention(fields: Fields, *, is_rope_interleaved: bool) -> MlaShape:
    attention = MlaShape(
        q_lora_rank=fields.count("q_lora_rank") if "q_lora_rank" in fields else None,
        kv_lora_rank=fields.count("kv_lora_rank"),
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=fields.count("qk_rope_head_dim", least=2),
        value_dim=fields.count("v_head_dim"),
        is_rope_interleaved=is_rope_interleaved,
    )
    num_heads = fields.count("num_attention_heads")
    if fields.count("num_key_value_heads", num_heads) != num_heads:
        bad("num_key_value_heads", fields.raw("num_key_value_heads"), "num_attention_heads with latent attention")
    if attention.value_dim > attention.nope_dim + attention.rope_dim:
        unsupported("v_head_dim", attention.value_dim, "at most qk_nope_head_dim + qk_rope_head_dim")
    return attention


def _parse_v3_moe(fields: Fields, num_first_dense_layers: int) -> MoeShape:
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
            num_first_dense_layers=num_first_dense_layers,
            **_parse_experts(fields),
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
            num_first_dense_layers=fields.count("first_k_dense_replace", least=0),
            **_parse_experts(fields),
        )
    )


def _parse_experts(fields: Fields) -> dict[str, Any]:
    return {
        "num_experts": fields.count("n_routed_experts"),
        "num_experts_per_token": fields.count("num_experts_per_tok"),
        "intermediate_size": fields.count("moe_intermediate_size"),
        "num_shared_experts": 0 if fields.is_null("n_shared_experts") else fields.count("n_shared_experts", least=0),
        "layer_stride": fields.count("moe_layer_freq", 1),
    }


def weights(config: ModelConfig, root: str = "") -> WeightTree:
    """Return the weights of a decoder with latent attention; `root` stands before every name."""
    shape = config.attention
    assert isinstance(shape, MlaShape)

    def layer(prefix: str, index: int) -> Iterator[Weight]:
        yield from latent_attention(prefix + "self_attn.", config, shape)
        if shape.indexer is not None and shape.q_lora_rank is not None:
            yield from indexer(prefix + "self_attn.indexer.", config, shape.indexer, shape.q_lora_rank)
        yield from feed_forward(prefix + "mlp.", config, index)

    return decoder(config, layer, root)


DEEPSEEK_V3 = Family(
    parse_v3,
    weights,
    defaults={
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
)
DEEPSEEK_V2 = Family(
    _parse_v2,
    weights,
    defaults={
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
)
KIMI_K2 = Family(parse_v3, weights, defaults={})
"""DeepSeek-V3's architecture under a name of its own."""
