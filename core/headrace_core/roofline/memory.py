"""What a worker's GPU must hold: weights and cache, per GPU, under TP, DP and EP.

KV cache of `l` layers, `b` sequences of `s` tokens, in values per GPU:

    MHA, GQA   2 l (b/DP) s max(1, heads_kv/TP) head_dim      TP divides heads, down to one
    MLA        l (b/DP) s (kv_lora_rank + rope_dim)           TP divides nothing: every head reads the whole latent
    sparse     the same, and index_head_dim                   the indexer's key, which every GPU scores by

In FP8 a latent also has a scale of four bytes for each 128 values, and its rope columns stay in BF16.

Weights: TP divides projections by heads, vocabulary and dense width; DP repeats them; experts are spread over all
GPUs. What all heads share, an indexer too, is on every GPU. Norms, biases and multi-token-prediction layers are left
out. Symbols are those of `operations`.
"""

from __future__ import annotations

from headrace_core.roofline.communication import ONE_GPU, Parallelism
from headrace_core.roofline.formula import evaluate
from headrace_core.roofline.model_shape import Dtype, MlaShape, ModelShape
from headrace_core.roofline.operations import operation_symbols
from headrace_core.roofline.step_load import StepLoad

CACHED_BYTES = "layers*kv"
"""The bytes that a token of one of a GPU's own sequences takes on it."""


def parameter_formulas(shape: ModelShape) -> dict[str, str]:
    """Return how many weights a GPU holds, by part of the network."""
    if isinstance(shape.attention, MlaShape):
        query = "Q*(N+H*(nope+R))" if shape.attention.q_lora_rank else "N*H*(nope+R)"
        attention = f"layers*({query} + N*(D+R) + D*H*(nope+v) + H*v*N + Q*J*I + N*I)"
    else:
        attention = "layers*N*h*(2*H+2*G)"
    return {
        "attention": attention,
        "dense": "dense_layers*3*N*Fd",
        "experts": "moe_layers*3*N*F*E/ep",
        "shared": "moe_layers*3*N*Fs",
        "router": "moe_layers*N*E",
        "index_weights": "layers*N*J",
        "vocabulary": "N*V" if shape.is_embedding_tied else "2*N*V",
    }


def weight_bytes_formula(shape: ModelShape) -> str:
    """Return the bytes of weights on a GPU; router, index weights and vocabulary keep the type of activations."""
    parts = parameter_formulas(shape)
    return f"w*({parts['attention']} + {parts['dense']} + {parts['experts']} + {parts['shared']})" + (
        f" + a*({parts['router']} + {parts['index_weights']} + {parts['vocabulary']})"
    )


def kv_bytes_per_gpu(shape: ModelShape, parallel: Parallelism, num_tokens: float, dtype: Dtype = Dtype.BF16) -> float:
    """Return the bytes of cache that a GPU holds when the worker's sequences have `num_tokens` tokens together."""
    return num_tokens / parallel.dp * kv_bytes_per_token_per_gpu(shape, parallel, dtype)


def kv_bytes_per_token_per_gpu(shape: ModelShape, parallel: Parallelism, dtype: Dtype = Dtype.BF16) -> float:
    """Return the bytes that a token of one of a GPU's own sequences takes on it."""
    symbols = operation_symbols(shape, StepLoad(), parallel, kv_dtype=dtype)
    return evaluate((CACHED_BYTES,), symbols)[0]


def parameters(shape: ModelShape, parallel: Parallelism = ONE_GPU) -> float:
    """Return how many weights a GPU holds; on one GPU, the model's."""
    symbols = operation_symbols(shape, StepLoad(), parallel)
    return sum(evaluate(tuple(parameter_formulas(shape).values()), symbols))


def weight_bytes_per_gpu(shape: ModelShape, parallel: Parallelism, dtype: Dtype = Dtype.BF16) -> float:
    """Return the bytes of weights on a GPU; in FP8, router and vocabulary stay in BF16."""
    symbols = operation_symbols(shape, StepLoad(), parallel, dtype=dtype)
    return evaluate((weight_bytes_formula(shape),), symbols)[0]
