"""Choose tokens from logits: filter by thresholds, then invert the cumulative distribution at a given number.

Shapes: L rows, V vocabulary. Every filter is a threshold on the logits, so that tokens that are equally probable are
kept or dropped together and neither the order of the vocabulary nor the rest of the batch matters. The draw walks the
vocabulary in order; nothing is sorted for it.
Bytes read: L * V * 4 a pass over the logits; greedy rows take one pass, drawn ones three, and each threshold that is
searched about six. Bound by memory bandwidth for greedy rows, else by the exponentials in float64.

`sample_tokens` is the entry for whole rows, `filter_logits` and `pick` are its parts, which run as plain torch
anywhere; `sample_tokens_ref` and `filter_logits_ref` are the specifications, `pick` is its own.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from headrace_kernels.backend import backend
from headrace_kernels.counter_random import uniforms
from headrace_kernels.draws import Draws

_NUCLEUS_CANDIDATES = 1024

_DTYPES = {
    "temperatures": torch.float64,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seeds": torch.int64,
    "sample_indices": torch.int64,
    "positions": torch.int64,
}


def sample_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """Return each row's token.

    Args:
        logits: [L, V] float32, finite or -inf, which is never drawn; at least one finite value in each row; not
            changed. Rows may be strided.
        draws: how each row chooses.

    Returns:
        [L] int64. Backends differ only where a sum of probabilities meets top_p or the number drawn to the last bits
        of float64. A row does not depend on the others.

    Raises:
        ValueError: a shape or type does not fit.
    """
    _check(logits, draws)
    if backend(logits) == "triton":
        from headrace_kernels.gpu import sampling as gpu

        return gpu.sample_tokens(logits, draws)
    tokens = logits.argmax(dim=-1)
    drawn = (draws.temperatures > 0).nonzero()[:, 0]
    if len(drawn):
        columns = Draws(*(getattr(draws, field.name)[drawn] for field in fields(Draws)))
        scaled = _scaled(logits[drawn], columns.temperatures)
        kept = filter_logits(scaled, columns.top_k, columns.top_p, columns.min_p)
        tokens[drawn] = pick(kept, uniforms(columns.seeds, columns.sample_indices, columns.positions))
    return tokens


def sample_tokens_ref(logits: Tensor, draws: Draws) -> Tensor:
    """Specification of `sample_tokens` in plain torch: every row is drawn, then the greedy ones are put right."""
    is_greedy = draws.temperatures == 0
    scaled = _scaled(logits, draws.temperatures.masked_fill(is_greedy, 1.0))
    kept = filter_logits_ref(scaled, draws.top_k, draws.top_p, draws.min_p)
    drawn = pick(kept, uniforms(draws.seeds, draws.sample_indices, draws.positions))
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)


def _check(logits: Tensor, draws: Draws) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.shape[1]:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}, not [L, V] float32")
    for name, dtype in _DTYPES.items():
        column: Tensor = getattr(draws, name)
        if column.shape != logits.shape[:1] or column.dtype != dtype or column.device != logits.device:
            raise ValueError(
                f"{name} is {tuple(column.shape)} {column.dtype} on {column.device}, "
                f"not [{len(logits)}] {dtype} on {logits.device}"
            )


def _scaled(logits: Tensor, temperatures: Tensor) -> Tensor:
    # Relative to the best one, so that no temperature, however small, leaves the range of float64 upwards.
    exact = logits.double()
    return (exact - exact.amax(dim=-1, keepdim=True)) / temperatures[:, None]


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
    left = logits
    if bool((top_k > 0).any()):
        top_k_floor = _top_k_floor(logits, top_k)
        floor = torch.maximum(floor, top_k_floor)
        left = logits.masked_fill(logits < top_k_floor[:, None], float("-inf")) if _any_below_one(top_p) else logits
    if _any_below_one(top_p):
        floor = torch.maximum(floor, _top_p_floor(left, top_p))
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
