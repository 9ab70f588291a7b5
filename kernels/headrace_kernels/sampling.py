"""Choose tokens from logits: filter by thresholds, then invert the cumulative distribution at a given number.

Shapes: L rows, V vocabulary. Every filter is a threshold on the logits, so that tokens that are equally probable are
kept or dropped together and neither the order of the vocabulary nor the rest of the batch matters. The draw walks the
vocabulary in order; nothing is sorted for it.
Bytes read: a few passes over L * V * 8; bound by memory bandwidth.

`filter_logits` and `pick` are the entries; `filter_logits_ref` is the specification of the first, `pick` its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NUCLEUS_CANDIDATES = 1024


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set the logits of the tokens that may not be drawn to -inf: top-k, then top-p of what is left, then min-p.

    Args:
        logits: [L, V] float64, already divided by the temperature; not changed.
        top_k: [L] int64; tokens as probable as the k-th stay; 0: off.
        top_p: [L] float64 in (0, 1]; the most probable tokens stay until their mass reaches top_p; 1: off.
        min_p: [L] float64 in [0, 1]; tokens at least min_p times as probable as the most probable stay; 0: off.

    Returns:
        [L, V] float64.
    """
    floor = logits.amax(dim=-1) + min_p.log()
    if bool((top_k > 0).any()):
        floor = torch.maximum(floor, _top_k_floor(logits, top_k))
        logits = logits.masked_fill(logits < floor[:, None], float("-inf")) if _any_below_one(top_p) else logits
    if _any_below_one(top_p):
        floor = torch.maximum(floor, _top_p_floor(logits, top_p))
    return logits.masked_fill(logits < floor[:, None], float("-inf"))


def filter_logits_ref(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Specification of `filter_logits` in plain torch: row by row, sorting everything."""
    out = logits.clone()
    for row, k, p, m in zip(out, top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True):
        best = row.max().clone()
        if 0 < k < len(row):
            row[row < row.sort(descending=True).values[k - 1]] = float("-inf")
        if p < 1:
            values, _ = row.sort(descending=True)
            mass = values.softmax(dim=0).cumsum(dim=0)
            row[row < values[int((mass < p).sum().clamp(max=len(row) - 1))]] = float("-inf")
        if m > 0:
            row[row < best + torch.tensor(m, dtype=row.dtype).log()] = float("-inf")
    return out


def pick(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which each row's cumulative distribution passes its number.

    Args:
        logits: [L, V] float64; -inf: never drawn; at least one finite value in each row.
        uniforms: [L] float64 in [0, 1).

    Returns:
        [L] int64.
    """
    masses = (logits - logits.amax(dim=-1, keepdim=True)).exp_().cumsum_(dim=-1)
    total = masses[:, -1]
    # Rounding may bring the target up to the total, where no token is left.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(masses, target[:, None], right=True)[:, 0]


def _any_below_one(top_p: Tensor) -> bool:
    return bool((top_p < 1).any())


def _top_k_floor(logits: Tensor, top_k: Tensor) -> Tensor:
    vocab_size = logits.shape[1]
    most = min(int(top_k.max()), vocab_size)
    best = logits.topk(most, dim=-1).values
    kth = best.gather(1, (top_k.clamp(1, most) - 1)[:, None])[:, 0]
    is_on = (top_k > 0) & (top_k < vocab_size)
    return torch.where(is_on, kth, torch.full_like(kth, float("-inf")))


def _top_p_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    vocab_size = logits.shape[1]
    total = logits.logsumexp(dim=-1, keepdim=True)
    candidates = min(_NUCLEUS_CANDIDATES, vocab_size)
    while True:
        best = logits.topk(candidates, dim=-1).values
        mass = (best - total).exp().cumsum(dim=-1)
        if candidates == vocab_size or bool((mass[:, -1] >= top_p).all()):
            break
        candidates = vocab_size
    needed = (mass < top_p[:, None]).sum(dim=-1).clamp_(max=candidates - 1)
    floor = best.gather(1, needed[:, None])[:, 0]
    return torch.where(top_p < 1, floor, torch.full_like(floor, float("-inf")))
