"""Qwen3-MoE: grouped-query attention whose heads' queries and keys are normalised, experts without shared ones.

Source: transformers 5.23 Qwen3MoeConfig, modeling_qwen3_moe.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from headrace_core.families.common_fields import (
    checked_moe,
    parse_common,
    parse_fp8_block,
    parse_grouped_query,
    parse_rope,
    refuse_layer_types,
)
from headrace_core.families.config import GqaShape, ModelConfig, MoeShape
from headrace_core.families.family import Family
from headrace_core.families.fields import Fields, bad, unsupported
from headrace_core.families.layers import decoder, feed_forward, grouped_query_attention
from headrace_core.families.weights import Weight, WeightTree


def _parse(fields: Fields) -> ModelConfig:
    _refuse_window(fields)
    fields.only("attention_bias", False, default=False)
    attention = parse_grouped_query(fields, has_head_norms=True)
    stride = fields.count("decoder_sparse_step")
    # The class's own name of it, by which transformers writes it, and the authors'.
    experts = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    moe = MoeShape(
        num_experts=fields.count(experts),
        num_experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count("moe_intermediate_size"),
        num_shared_experts=0,
        num_first_dense_layers=0,
        layer_stride=stride,
        layer_remainder=stride - 1,
        dense_layers=_dense_layers(fields),
        scoring="softmax",
        num_groups=1,
        num_groups_kept=1,
        is_group_score_top2=False,
        is_normalised=fields.flag("norm_topk_prob", False),
        scaling_factor=1.0,
        has_correction_bias=False,
    )
    return ModelConfig(
        family="qwen3_moe",
        dense_intermediate_size=fields.count("intermediate_size"),
        has_attention_bias=False,
        attention=attention,
        rope=parse_rope(fields, attention.head_dim, default_theta=10_000.0),
        moe=checked_moe(moe),
        num_heads=fields.count("num_attention_heads"),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        fp8_block=parse_fp8_block(fields),
        **parse_common(fields),
    )


def _refuse_window(fields: Fields) -> None:
    """Refuse a window that is in use; published configs name one that is not."""
    if fields.flag("use_sliding_window", False) and not fields.is_null("sliding_window"):
        unsupported("use_sliding_window", True, "false")
    refuse_layer_types(fields)


def _dense_layers(fields: Fields) -> tuple[int, ...]:
    value: object = fields.raw("mlp_only_layers") or []
    layers = cast("list[object]", value) if isinstance(value, list) else [None]
    if any(type(layer) is not int for layer in layers):
        bad("mlp_only_layers", value, "a list of layers' indices, or null")
    num_layers = fields.count("num_hidden_layers")
    return tuple(sorted({layer for layer in cast("list[int]", layers) if 0 <= layer < num_layers}))


def _weights(config: ModelConfig) -> WeightTree:
    shape = config.attention
    assert isinstance(shape, GqaShape)

    def layer(prefix: str, index: int) -> Iterator[Weight]:
        yield from grouped_query_attention(prefix + "self_attn.", config, shape)
        yield from feed_forward(prefix + "mlp.", config, index)

    return decoder(config, layer)


QWEN3_MOE = Family(
    _parse,
    _weights,
    defaults={
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 32_768,
    },
)
