"""The roofline's sizes of a network that the engine runs."""

from __future__ import annotations

from headrace_core.families.config import MlaShape, ModelConfig
from headrace_core.roofline import model_shape as roofline


def shape_of(config: ModelConfig, name: str) -> roofline.ModelShape:
    """Return what the roofline counts by; `name` is the model's."""
    shape, moe = config.attention, config.moe
    attention = (
        _latents(shape) if isinstance(shape, MlaShape) else roofline.GqaShape(shape.num_kv_heads, shape.head_dim)
    )
    mixture = roofline.MoeShape(
        moe.num_experts,
        moe.num_experts_per_token,
        moe.intermediate_size,
        moe.num_shared_experts * moe.intermediate_size,
        num_dense_layers=sum(not config.is_moe_layer(layer) for layer in range(config.num_layers)),
    )
    return roofline.ModelShape(
        name,
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.vocab_size,
        config.dense_intermediate_size,
        attention,
        mixture,
        config.is_embedding_tied,
    )


def _latents(shape: MlaShape) -> roofline.MlaShape:
    chooser = shape.indexer and roofline.IndexerShape(
        shape.indexer.num_heads, shape.indexer.head_dim, shape.indexer.top_k
    )
    return roofline.MlaShape(
        shape.q_lora_rank or 0, shape.kv_lora_rank, shape.nope_dim, shape.rope_dim, shape.value_dim, chooser
    )
