"""Mixtral: grouped-query attention, experts in every layer.

Source: transformers 5.23 MixtralConfig.
"""

from __future__ import annotations

from collections.abc import Iterator

from headrace_core.families.common_fields import (
    checked_moe,
    parse_common,
    parse_grouped_query,
    parse_rope,
    refuse_windows,
)
from headrace_core.families.config import GqaShape, ModelConfig, MoeShape
from headrace_core.families.family import Family
from headrace_core.families.fields import Fields, unsupported
from headrace_core.families.layers import decoder, grouped_query_attention, mixture
from headrace_core.families.weights import Weight, WeightTree


def _parse(fields: Fields) -> ModelConfig:
    refuse_windows(fields)
    if "quantization_config" in fields:
        unsupported("quantization_config", fields.raw("quantization_config"), "null for mixtral")
    attention = parse_grouped_query(fields)
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
        attention=attention,
        rope=parse_rope(fields, attention.head_dim, default_theta=1_000_000.0),
        moe=checked_moe(moe),
        num_heads=fields.count("num_attention_heads"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5),
        **parse_common(fields),
    )


def _weights(config: ModelConfig) -> WeightTree:
    shape = config.attention
    assert isinstance(shape, GqaShape)

    def layer(prefix: str, index: int) -> Iterator[Weight]:
        yield from grouped_query_attention(prefix + "self_attn.", config, shape)
        yield from mixture(prefix + "block_sparse_moe.", config, ("w1", "w3", "w2"))

    return decoder(config, layer)


MIXTRAL = Family(
    _parse,
    _weights,
    defaults={
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
)
