"""Causal attention of ragged sequences whose keys and values lie in plain tensors: what both prefill families run on.

Shapes: T query tokens and S key tokens over all sequences, B sequences, H query heads, G key heads (H a multiple of G),
Dq query and key width, Dv value width. Sequence b owns queries `query_starts[b]:query_starts[b + 1]` and keys
`key_starts[b]:key_starts[b + 1]`; its last query stands at its last key, so that earlier keys are a cached prefix.
FLOPs: 2 * H * (Dq + Dv) * pairs, pairs about T * S / 2 without a prefix; bound by compute.

`causal_attention` is the entry; `causal_attention_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return causal softmax attention, sequence by sequence.

    Args:
        query: [T, H, Dq], any float dtype.
        key: [S, G, Dq], dtype of `query`.
        value: [S, G, Dv], Dv <= Dq, dtype of `query`.
        query_starts: [B + 1] int32 on the host, ascending from 0 to T.
        key_starts: [B + 1] int32 on the host, ascending from 0 to S; no sequence has fewer keys than queries.
        scale: multiplies the scores; positive.

    Returns:
        [T, H, Dv], dtype of `query`; scores and softmax in float32. A sequence's rows do not depend on the others, on
        "triton" to the last bit.

    Raises:
        ValueError: the shapes, types or starts do not fit.
    """
    if key.shape[:2] != value.shape[:2] or key.shape[2] != query.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "do not fit [T, H, Dq], [S, G, Dq], [S, G, Dv]"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}")
    check_starts(query_starts, key_starts, len(query), len(key), scale)
    return select("causal_attention", query).causal_attention(query, key, value, query_starts, key_starts, scale=scale)


def check_starts(query_starts: Tensor, key_starts: Tensor, num_queries: int, num_keys: int, scale: float) -> None:
    """Refuse starts that would let a kernel read or write beyond its tensors, and a scale that is not positive.

    Raises:
        ValueError: what is wrong with them.
    """
    if query_starts.device.type != "cpu" or key_starts.device.type != "cpu":
        raise ValueError("query_starts and key_starts must be on the host: reading them there must not wait for a GPU")
    if (
        not query_starts.dtype == key_starts.dtype == torch.int32
        or not query_starts.stride() == key_starts.stride() == (1,)
    ):
        raise ValueError(
            f"query_starts {query_starts.dtype} and key_starts {key_starts.dtype} must be int32, contiguous"
        )
    queries, keys = query_starts.tolist(), key_starts.tolist()
    does_fit = len(queries) == len(keys) > 0 and queries[0] == keys[0] == 0
    if not does_fit or queries[-1] != num_queries or keys[-1] != num_keys:
        raise ValueError(
            f"query_starts {queries} and key_starts {keys} must be as many, begin at 0 "
            f"and end at {num_queries} queries and {num_keys} keys"
        )
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        if not 0 <= q1 - q0 <= k1 - k0:
            raise ValueError(f"a sequence of query_starts {queries}, key_starts {keys} has more queries than keys")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")


def causal_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Specification of `causal_attention` in plain torch."""
    group = query.shape[1] // key.shape[1]
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    for b in range(len(query_starts) - 1):
        q0, q1 = int(query_starts[b]), int(query_starts[b + 1])
        k0, k1 = int(key_starts[b]), int(key_starts[b + 1])
        keys = key[k0:k1].float().repeat_interleave(group, dim=1)
        values = value[k0:k1].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1].float(), keys) * scale
        is_visible = scores.new_ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
        weights = torch.softmax(scores.masked_fill(~is_visible, float("-inf")), dim=-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
    return out
