"""`headrace_kernels.causal_attention` in plain torch: torch's fused attention, sequence by sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES_PER_MASK = 256


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, *, scale: float
) -> Tensor:
    """See `headrace_kernels.causal_attention.causal_attention`."""
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
