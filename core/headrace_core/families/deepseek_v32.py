"""DeepSeek-V3.2: DeepSeek-V3's network, whose attention is sparse: an indexer chooses the tokens that it is over.

Source: transformers 5.23 DeepseekV32Config, modeling_deepseek_v32.py.
"""

from __future__ import annotations

from dataclasses import replace

from headrace_core.families import deepseek
from headrace_core.families.config import IndexerShape, MlaShape, ModelConfig
from headrace_core.families.family import Family
from headrace_core.families.fields import Fields, bad, unsupported


def _parse(fields: Fields) -> ModelConfig:
    config = deepseek.parse_v3(fields, layer_type="indexed_attention")
    num_dense = min(config.moe.num_first_dense_layers, config.num_layers)
    kinds = ["dense"] * num_dense + ["sparse"] * (config.num_layers - num_dense)
    if fields.raw("mlp_layer_types") not in (None, kinds):
        unsupported("mlp_layer_types", fields.raw("mlp_layer_types"), f"{num_dense} times dense, then sparse alone")
    shape = config.attention
    assert isinstance(shape, MlaShape)
    if shape.q_lora_rank is None:
        bad("q_lora_rank", None, "a whole number: the indexer's queries are made of the query's latent")
    if not shape.is_rope_interleaved:
        unsupported("rope_interleave", False, "true for deepseek_v32, as its class has it")
    indexer = IndexerShape(fields.count("index_n_heads"), fields.count("index_head_dim"), fields.count("index_topk"))
    if indexer.head_dim < shape.rope_dim:
        bad("index_head_dim", indexer.head_dim, f"at least qk_rope_head_dim, {shape.rope_dim}")
    return replace(config, family="deepseek_v32", attention=replace(shape, indexer=indexer))


DEEPSEEK_V32 = Family(
    _parse,
    deepseek.weights,
    defaults={
        **deepseek.DEEPSEEK_V3.defaults,
        "max_position_embeddings": 163_840,
        "index_topk": 2048,
        "index_head_dim": 128,
        "index_n_heads": 64,
    },
)
