"""What a worker on a GPU needs beside weights and pages, from the shape of its network and the limits of its steps.

Counted are the tensors that are there at once while a step computes: those of a layer, or those of sampling. Captured
decode steps keep such memory for themselves. The rest is estimated: what torch's allocator rounds up or can't use for
other sizes, and what compiled kernels, cuBLAS and captured graphs take.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace_kernels.expert_blocks import bounds
from headrace_kernels.moe_experts import best_block_size

from headrace_core.families.config import GqaShape, MlaShape, ModelConfig
from headrace_core.kv.layout import KvLayout
from headrace_core.model.sparse_mla import BLOCK_BYTES
from headrace_core.model.step_inputs import GROUP_KEY_TOKENS

FIXED_BYTES = 768 << 20
"""Modules of kernels, cuBLAS's workspaces, captured graphs: an estimate, not measured."""
_ALLOCATOR_SHARE = 1 / 8
"""Of what is counted: an estimate, not measured."""
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What bounds a step; as the settings of the same names, `max_context_tokens` 0: the model's own limit."""

    max_step_tokens: int = 512
    max_step_sequences: int = 64
    max_context_tokens: int = 0


def gpu_working_bytes(
    config: ModelConfig, layout: KvLayout, limits: StepLimits, kv_pool_bytes: int, *, itemsize: int
) -> int:
    """Return the bytes to leave free on a GPU for steps within `limits`.

    Args:
        config: the network.
        layout: its cache.
        limits: of a step.
        kv_pool_bytes: no context is longer than what fits in so many bytes of pages.
        itemsize: bytes of a value of the type that it computes in; cached rows are brought to it before they are used.
    """
    rows = limits.max_step_sequences
    longest = min(limits.max_context_tokens or config.max_context_tokens, kv_pool_bytes // layout.token_bytes)
    num_logits = rows * config.vocab_size
    step_bytes = max(
        layer_bytes(config, itemsize, limits.max_step_tokens, max(GROUP_KEY_TOKENS, longest)),
        # The logits, changed ones, those to rank for log-probabilities, and what ranks them, eight bytes and four each.
        num_logits * 6 * _FLOAT32,
        # The check of the kernels brings gate and up of one expert to float32.
        2 * config.moe.intermediate_size * config.hidden_size * _FLOAT32,
    )
    # Logits as they are computed, in float32, and those that all captured steps leave theirs in.
    captured_bytes = layer_bytes(config, itemsize, rows, 0) + num_logits * (itemsize + 2 * _FLOAT32)
    # What each sequence keeps that asks for penalties: which tokens it has seen, and how often.
    penalty_bytes = num_logits * (1 + _FLOAT32)
    return FIXED_BYTES + int((step_bytes + captured_bytes + penalty_bytes) * (1 + _ALLOCATOR_SHARE))


def layer_bytes(config: ModelConfig, itemsize: int, num_tokens: int, num_keys: int) -> int:
    """Return the bytes of the tensors that are there at once in a layer: in attention, or in what follows it.

    Args:
        config: the network.
        itemsize: bytes of a value of the type that it computes in.
        num_tokens: of the step.
        num_keys: tokens of contexts whose latents are expanded at once.
    """
    stream = num_tokens * config.hidden_size * itemsize
    shape = config.attention
    attention = (
        _latent_attention_values(shape, config.num_heads, num_tokens, num_keys)
        if isinstance(shape, MlaShape)
        else _grouped_attention_values(config, shape, num_tokens)
    )
    # Scores and what sorts them, and gathered rows.
    chosen = 4 * BLOCK_BYTES if config.is_attention_sparse else 0
    most = max(stream + attention * itemsize + chosen, 3 * stream + _expert_bytes(config, itemsize, num_tokens))
    if all(config.is_moe_layer(layer) for layer in range(config.num_layers)):
        return most
    # Gate and up, and the activation of the gate, which becomes the product with up; the normalised input is gone then.
    return max(most, stream + 3 * num_tokens * config.dense_intermediate_size * itemsize)


def _latent_attention_values(shape: MlaShape, num_heads: int, num_tokens: int, num_keys: int) -> int:
    """Return how many values queries, what was projected with them, latents, keys, values and results are."""
    query_dim, row_dim = num_heads * (shape.nope_dim + shape.rope_dim), shape.kv_lora_rank + shape.rope_dim
    projected = query_dim + row_dim + (shape.q_lora_rank or 0)
    expanded = row_dim + num_heads * (shape.nope_dim + shape.value_dim)
    return num_tokens * (projected + num_heads * shape.value_dim) + num_keys * expanded


def _grouped_attention_values(config: ModelConfig, shape: GqaShape, num_tokens: int) -> int:
    """Return how many values queries, keys and values, the first two rotated, are, and what there is beside them.

    That is the results, what is projected of them and its sum with the stream, or before that the normalised heads.
    """
    heads, groups = config.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    normalised = heads + groups if shape.has_head_norms else 0
    return num_tokens * (2 * heads + 3 * groups + max(heads + 2 * config.hidden_size, normalised))


def _expert_bytes(config: ModelConfig, itemsize: int, num_tokens: int) -> int:
    """Return the bytes of the router's logits, of the rows between the experts' products, and of those after them.

    The rows between are padded to blocks of one expert; after them there is one for each expert of a token.
    """
    moe = config.moe
    num_experts = moe.num_experts + moe.num_shared_experts
    num_assignments = num_tokens * (moe.num_experts_per_token + moe.num_shared_experts)
    padded, _ = bounds(num_assignments, num_experts, best_block_size(num_assignments, num_experts))
    rows = padded * moe.intermediate_size + num_assignments * config.hidden_size
    return num_tokens * moe.num_experts * _FLOAT32 + rows * itemsize
