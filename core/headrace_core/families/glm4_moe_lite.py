"""GLM-4.7-Flash: DeepSeek-V3's network, whose dense layers are listed one by one.

Source: transformers 5.23 Glm4MoeLiteConfig, modeling_glm4_moe_lite.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from headrace_core.families import deepseek
from headrace_core.families.config import ModelConfig
from headrace_core.families.family import Family
from headrace_core.families.fields import Fields, bad

_KINDS = ("dense", "sparse")


def _parse(fields: Fields) -> ModelConfig:
    dense_layers = _dense_layers(fields)
    config = deepseek.parse_v3(fields, num_first_dense_layers=0)
    moe = replace(config.moe, layer_stride=1, dense_layers=dense_layers)
    return replace(config, family="glm4_moe_lite", moe=moe)


def _dense_layers(fields: Fields) -> tuple[int, ...]:
    """Return the indices of layers without experts: those so listed, else the first."""
    num_layers, value = fields.count("num_hidden_layers"), cast("object", fields.raw("mlp_layer_types"))
    dense: tuple[int, ...] = (0,)
    if value is not None:
        kinds = cast("list[object]", value) if isinstance(value, list) else []
        if len(kinds) != num_layers or any(kind not in _KINDS for kind in kinds):
            bad("mlp_layer_types", value, f"a list of {num_layers} times dense or sparse, or null")
        dense = tuple(index for index, kind in enumerate(kinds) if kind == "dense")
    # Published beside the list, and read by no class of transformers'; where they differ one of them misleads.
    if "first_k_dense_replace" in fields and dense != tuple(range(fields.count("first_k_dense_replace", least=0))):
        bad("first_k_dense_replace", fields.raw("first_k_dense_replace"), f"{len(dense)}, as by mlp_layer_types")
    fields.only("moe_layer_freq", 1, default=1)
    return dense


GLM4_MOE_LITE = Family(
    _parse,
    deepseek.weights,
    defaults={
        "vocab_size": 154_880,
        "hidden_size": 2048,
        "intermediate_size": 10_240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "max_position_embeddings": 202_752,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 1,
    },
)
