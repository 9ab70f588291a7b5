"""Which tensors a checkpoint of a config must hold: names and shapes."""

from __future__ import annotations

from collections.abc import Iterator

from headrace_core.families.config import GqaShape, MlaShape, ModelConfig


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor the network needs: its name in the checkpoint, and its shape.

    One at a time, since a config may speak of more than memory holds the names of.
    """
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.is_embedding_tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, shape in _attention(config):
            yield prefix + "self_attn." + name, shape
        for name, shape in _feed_forward(config, layer):
            yield prefix + name, shape


def _attention(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    shape, hidden, heads = config.attention, config.hidden_size, config.num_heads
    if isinstance(shape, GqaShape):
        yield "q_proj.weight", (heads * shape.head_dim, hidden)
        yield "k_proj.weight", (shape.num_kv_heads * shape.head_dim, hidden)
        yield "v_proj.weight", (shape.num_kv_heads * shape.head_dim, hidden)
        yield "o_proj.weight", (hidden, heads * shape.head_dim)
        return
    yield from _mla(shape, hidden, heads)
    if config.has_attention_bias:
        if shape.q_lora_rank is not None:
            yield "q_a_proj.bias", (shape.q_lora_rank,)
        yield "kv_a_proj_with_mqa.bias", (shape.kv_lora_rank + shape.rope_dim,)
        yield "o_proj.bias", (hidden,)


def _mla(shape: MlaShape, hidden: int, heads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    query_dim = heads * (shape.nope_dim + shape.rope_dim)
    if shape.q_lora_rank is None:
        yield "q_proj.weight", (query_dim, hidden)
    else:
        yield "q_a_proj.weight", (shape.q_lora_rank, hidden)
        yield "q_a_layernorm.weight", (shape.q_lora_rank,)
        yield "q_b_proj.weight", (query_dim, shape.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (shape.kv_lora_rank + shape.rope_dim, hidden)
    yield "kv_a_layernorm.weight", (shape.kv_lora_rank,)
    yield "kv_b_proj.weight", (heads * (shape.nope_dim + shape.value_dim), shape.kv_lora_rank)
    yield "o_proj.weight", (hidden, heads * shape.value_dim)


def _feed_forward(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, moe = config.hidden_size, config.moe
    if not config.is_moe_layer(layer):
        yield from _mlp("mlp.", config.dense_intermediate_size, hidden)
        return
    if config.family == "mixtral":
        yield "block_sparse_moe.gate.weight", (moe.num_experts, hidden)
        for expert in range(moe.num_experts):
            prefix = f"block_sparse_moe.experts.{expert}."
            yield prefix + "w1.weight", (moe.intermediate_size, hidden)
            yield prefix + "w3.weight", (moe.intermediate_size, hidden)
            yield prefix + "w2.weight", (hidden, moe.intermediate_size)
        return
    yield "mlp.gate.weight", (moe.num_experts, hidden)
    if moe.has_correction_bias:
        yield "mlp.gate.e_score_correction_bias", (moe.num_experts,)
    for expert in range(moe.num_experts):
        yield from _mlp(f"mlp.experts.{expert}.", moe.intermediate_size, hidden)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.intermediate_size
        yield from _mlp("mlp.shared_experts.", width, hidden)


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)
