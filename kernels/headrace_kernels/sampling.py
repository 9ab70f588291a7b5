"""Choose tokens from logits: filter by thresholds, then invert the cumulative distribution at a given number.

Shapes: L rows, V vocabulary. Every filter is a threshold on the logits, so that tokens that are equally probable are
kept or dropped together and neither the order of the vocabulary nor the rest of the batch matters. The draw walks the
vocabulary in order; nothing is sorted for it.
Bytes read: L * V * 4 a pass over the logits; greedy rows take one pass, drawn ones two, or three with a threshold; a
threshold that leaves very many tokens takes about six more. Bound by memory bandwidth for greedy rows, else by the
exponentials in float64.

A row whose logits leave no choice (a NaN or an infinite one among them, or every one -inf) gets NO_TOKEN, not a token:
what is returned is NO_TOKEN or the id of a token whose logit is finite.

`sample_tokens` is the entry, `sample_tokens_ref` its specification; `filter_logits_ref` specifies which tokens may be
drawn, `pick` is what draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.counter_random import uniforms
from headrace_kernels.dispatch import select
from headrace_kernels.draws import NO_TOKEN, Draws

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
        logits: [L, V] float32, finite or -inf, which is never chosen; not changed. Rows may be strided.
        draws: how each row chooses.

    Returns:
        [L] int64; NO_TOKEN for a row with a NaN or +inf, or with nothing but -inf. Backends differ only where a sum of
        probabilities meets top_p or the number drawn to the last bits of float64. A row does not depend on the others.

    Raises:
        ValueError: a shape or type does not fit.
    """
    _check(logits, draws)
    return select("sampling", logits).sample_tokens(logits, draws)


def sample_tokens_ref(logits: Tensor, draws: Draws) -> Tensor:
    """Specification of `sample_tokens` in plain torch: every row is drawn, then those that are not are put right."""
    is_greedy = draws.temperatures == 0
    is_bad = logits.isnan().any(dim=-1) | logits.isposinf().any(dim=-1) | logits.isneginf().all(dim=-1)
    logits = logits.masked_fill(is_bad[:, None], 0.0)
    scaled = tempered(logits, draws.temperatures.masked_fill(is_greedy, 1.0))
    kept = filter_logits_ref(scaled, draws.top_k, draws.top_p, draws.min_p)
    drawn = pick(kept, uniforms(draws.seeds, draws.sample_indices, draws.positions))
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn).masked_fill(is_bad, NO_TOKEN)


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


def tempered(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Return logits [L, V] divided by their rows' temperatures [L], in float64."""
    # Relative to the best one, so that no temperature, however small, leaves the range of float64 upwards.
    exact = logits.double()
    return (exact - exact.amax(dim=-1, keepdim=True)) / temperatures[:, None]


def filter_logits_ref(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Specification of `reference.sampling.filter_logits` in plain torch: row by row, sorting everything."""
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
