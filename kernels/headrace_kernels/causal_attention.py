"""Causal attention of ragged sequences whose keys and values lie in plain tensors: what both prefill families run on.

Shapes: T query tokens and S key tokens over all sequences, B sequences, H query heads, G key heads (H a multiple of G),
Dq query and key width, Dv value width. Sequence b owns queries `query_starts[b]:query_starts[b + 1]` and keys
`key_starts[b]:key_starts[b + 1]`; its last query stands at its last key, so that earlier keys are a cached prefix.
FLOPs: 2 * H * (Dq + Dv) * pairs, pairs about T * S / 2 without a prefix; bound by compute.

`causal_attention` is the entry; `causal_attention_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.backend import backend

_QUERIES_PER_MASK = 256


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
    if backend(query) == "triton":
        from headrace_kernels.gpu import causal_attention as gpu

        return gpu.causal_attention(query, key, value, query_starts, key_starts, scale=scale)
    value_dim = value.shape[2]
    padded = value
    if value_dim < key.shape[2]:
        # torch's fused CPU attention wants one width for keys and values.
        padded = F.pad(value, (0, key.shape[2] - value_dim))
    queries, keys = query_starts.tolist(), key_starts.tolist()
    outputs = [
        _one_sequence(query[q0:q1], key[k0:k1], padded[k0:k1], scale)
        for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False)
    ]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out[..., :value_dim]


def check_starts(query_starts: Tensor, key_starts: Tensor, num_queries: int, num_keys: int, scale: float) -> None:
    """Refuse starts that would let a kernel read or write beyond its tensors, and a scale that is not positive.

    Raises:
        ValueError: what is wrong with them.
    """
    if query_starts.device.type != "cpu" or key_starts.device.type != "cpu":
        raise ValueError("query_starts and key_starts must be on the host: reading them there must not wait for a GPU")
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


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    num_queries, num_keys = query.shape[0], key.shape[0]
    if num_queries in (1, num_keys):
        return _attend(query, key, value, scale, None, is_causal=num_queries == num_keys)
    # Behind a cached prefix, queries go in pieces: less is computed only to be masked, and masks stay small.
    outputs: list[Tensor] = []
    for first in range(0, num_queries, _QUERIES_PER_MASK):
        end = min(first + _QUERIES_PER_MASK, num_queries)
        visible = num_keys - num_queries + end
        mask = query.new_full((end - first, visible), float("-inf")).triu_(visible - (end - first) + 1)
        outputs.append(_attend(query[first:end], key[:visible], value[:visible], scale, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Return attention [T, H, Dq] of one piece; `mask` [T, S], dtype of `query`, is added to the scores."""
    if query.device.type != "cpu" or 0 in (len(query), len(key)):
        heads = (each.transpose(0, 1)[None] for each in (query, key, value))
        is_grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )
        return out[0].transpose(0, 1)
    # What scaled_dot_product_attention calls on a CPU; here for the log-sum-exp, which tells where it gave up.
    out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(each.transpose(0, 1)[None] for each in (query, key, value)), is_causal=is_causal, attn_mask=mask, scale=scale
    )
    out = out[0].transpose(0, 1)
    is_doubtful = (log_sum_exp[0] == 0) | ~log_sum_exp[0].isfinite()
    if bool(is_doubtful.any()):
        for head in is_doubtful.any(dim=1).nonzero()[:, 0].tolist():
            keys = key[:, head * key.shape[1] // query.shape[1]]
            for rows in is_doubtful[head].nonzero()[:, 0].split(_QUERIES_PER_MASK):
                out[rows, head] += _nan_where_given_up(query[:, head], keys, scale, rows)
    return out


def _nan_where_given_up(query: Tensor, key: Tensor, scale: float, rows: Tensor) -> Tensor:
    """Return for each of `rows` of a head NaN if it has no score above -inf among the keys it sees, else 0; [rows, 1].

    There softmax is NaN. torch's fused kernel takes such a row, all its scores -inf or, with fewer keys than a vector
    has lanes, NaN, for one that is masked throughout: its result is 0, a number like any other, and its log-sum-exp 0.
    """
    scores = query[rows].float() @ key.float().T * scale
    is_visible = torch.arange(len(key)) <= (rows + len(key) - len(query))[:, None]
    is_sound = ((scores < float("inf")) | ~is_visible).all(dim=1) & ((scores > float("-inf")) & is_visible).any(dim=1)
    return torch.where(is_sound, 0.0, float("nan")).to(query.dtype)[:, None]


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
