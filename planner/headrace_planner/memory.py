"""What a worker's GPU must hold: weights and cache, per GPU, under TP, DP and EP.

KV cache of `l` layers, `b` sequences of `s` tokens, in values per GPU:

    MHA, GQA   2 l (b/DP) s max(1, heads_kv/TP) head_dim      TP divides heads, down to one
    MLA        l (b/DP) s (kv_lora_rank + rope_dim)           TP divides nothing: every head reads the whole latent

Weights: TP divides projections by heads, vocabulary and dense width; DP repeats them; experts are spread over all GPUs.
"""

from __future__ import annotations

from headrace_planner.communication import Parallelism
from headrace_planner.model_shape import Dtype, MlaShape, ModelShape


def kv_bytes_per_gpu(shape: ModelShape, parallel: Parallelism, num_tokens: float, dtype: Dtype = Dtype.BF16) -> float:
    """Return the bytes of cache that a GPU holds when the worker's sequences have `num_tokens` tokens together."""
    return num_tokens / parallel.dp * kv_bytes_per_token_per_gpu(shape, parallel, dtype)


def kv_bytes_per_token_per_gpu(shape: ModelShape, parallel: Parallelism, dtype: Dtype = Dtype.BF16) -> float:
    """Return the bytes that a token of one of a GPU's own sequences takes on it."""
    whole = shape.kv_bytes_per_token(dtype)
    if isinstance(shape.attention, MlaShape):
        return whole
    heads = shape.attention.num_kv_heads
    return whole * max(1.0, heads / parallel.tp) / heads


def attention_parameters(shape: ModelShape, tp: int = 1) -> float:
    """Return the weights of one layer's attention on one of `tp` GPUs: what heads share is on each of them."""
    hidden, heads, attention = shape.hidden_size, shape.num_heads / tp, shape.attention
    if not isinstance(attention, MlaShape):
        kv_heads = max(1.0, attention.num_kv_heads / tp)
        return hidden * attention.head_dim * (2 * heads + 2 * kv_heads)
    query_width = heads * (attention.nope_dim + attention.rope_dim)
    rank = attention.q_lora_rank
    query = rank * (hidden + query_width) if rank else hidden * query_width
    latent = hidden * attention.cached_values_per_token
    expansion = attention.kv_lora_rank * heads * (attention.nope_dim + attention.value_dim)
    return query + latent + expansion + heads * attention.value_dim * hidden


def parameters(shape: ModelShape, parallel: Parallelism | None = None) -> float:
    """Return the weights on one GPU, norms and biases left out; `parallel` None: of the whole model.

    Without the multi-token-prediction layers that a checkpoint may have after the others.
    """
    split = parallel or Parallelism()
    per_width = 3 * shape.hidden_size
    total = shape.num_layers * attention_parameters(shape, split.tp)
    total += shape.num_dense_layers * per_width * shape.dense_intermediate_size / split.tp
    total += (1 if shape.is_embedding_tied else 2) * shape.vocab_size * shape.hidden_size / split.tp
    if shape.moe:
        experts = per_width * shape.moe.num_experts * shape.moe.intermediate_size / split.num_gpus
        shared = per_width * shape.moe.shared_intermediate_size / split.tp
        total += shape.num_moe_layers * (experts + shared + shape.hidden_size * shape.moe.num_experts)
    return total


def weight_bytes_per_gpu(shape: ModelShape, parallel: Parallelism, dtype: Dtype = Dtype.BF16) -> float:
    """Return the bytes of weights on a GPU; in FP8 the vocabulary's stay in BF16."""
    vocabulary = (1 if shape.is_embedding_tied else 2) * shape.vocab_size * shape.hidden_size / parallel.tp
    rest = parameters(shape, parallel) - vocabulary
    return rest * dtype.itemsize + vocabulary * dtype.activation.itemsize
