"""Choose tokens from logits: filter by thresholds, then invert the cumulative distribution at a given number.

Shapes: L rows, V vocabulary. Every filter is a threshold on the logits, so that tokens that are equally probable are
kept or dropped together and neither the order of the vocabulary nor the rest of the batch matters. The draw walks the
vocabulary in order; nothing is sorted for it.
Bytes read: L * V * 4 a pass over the logits; greedy rows take one pass, drawn ones two, or three with a threshold; a
threshold that leaves very many tokens takes about six more. Bound by memory bandwidth for greedy rows, else by the
exponentials in float64.

A row whose logits leave no choice (a NaN or an infinite one among them, or every one -inf) gets NO_TOKEN, not a token:
what is returned is NO_TOKEN or the id of a token whose logit is finite.

`sample_tokens` is the entry for whole rows, `filter_logits` and `pick` are its parts, which run as plain torch
anywhere; `sample_tokens_ref` and `filter_logits_ref` are the specifications, `pick` is its own.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from headrace_kernels.backend import backend
from headrace_kernels.counter_random import uniforms
from headrace_kernels.draws import NO_TOKEN, Draws

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
        logits: [L, V] float32, finite or -inf, which is never chosen; not changed. Rows may be strided.
        draws: how each row chooses.

    Returns:
        [L] int64; NO_TOKEN for a row with a NaN or +inf, or with nothing but -inf. Backends differ only where a sum of
        probabilities meets top_p or the number drawn to the last bits of float64. A row does not depend on the others.

    Raises:
        ValueError: a shape or type does not fit.
    """
    _check(logits, draws)
    if backend(logits) == "triton":
        from headrace_kernels.gpu import sampling as gpu

        return gpu.sample_tokens(logits, draws)
    is_answerable = logits.amax(dim=-1).isfinite()  # NaN wins every comparison
    tokens = logits.argmax(dim=-1).masked_fill_(~is_answerable, NO_TOKEN)
    drawn = ((draws.temperatures > 0) & is_answerable).nonzero()[:, 0]
    if len(drawn):
        columns = Draws(*(getattr(draws, field.name)[drawn] for field in fields(Draws)))
        scaled = tempered(logits[drawn], columns.temperatures)
        kept = filter_logits(scaled, columns.top_k, columns.top_p, columns.min_p)
        tokens[drawn] = pick(kept, uniforms(columns.seeds, columns.sample_indices, columns.positions))
    return tokens


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
    floor = torch.full_like(min_p, float("-inf"))
    # Each row pays for what it asks itself: a filter works on the rows that have it on.
    cut = ((top_k > 0) & (top_k < logits.shape[1])).nonzero()[:, 0]
    if len(cut):
        floor[cut] = _top_k_floor(logits[cut], top_k[cut])
    nucleus = (top_p < 1).nonzero()[:, 0]
    if len(nucleus):
        left = logits[nucleus]
        left = left.masked_fill_(left < floor[nucleus, None], float("-inf"))
        floor[nucleus] = torch.maximum(floor[nucleus], _top_p_floor(left, top_p[nucleus]))
    floor = torch.maximum(floor, logits.amax(dim=-1) + min_p.log())
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


def _top_k_floor(logits: Tensor, top_k: Tensor) -> Tensor:
    """Return each row's k-th best logit; 0 < k < V."""
    values = logits.cpu().numpy()
    places = (logits.shape[1] - top_k).tolist()
    # A selection takes the same time for every k; torch's topk takes 40 times as long for a large one.
    kth = [np.partition(row, place)[place] for row, place in zip(values, places, strict=True)]
    return torch.tensor(np.stack(kth), device=logits.device)


def _top_p_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    """Return each row's highest logit down to which the mass is `top_p`, which is below 1."""
    vocab_size = logits.shape[1]
    total = logits.logsumexp(dim=-1, keepdim=True)
    candidates = min(_NUCLEUS_CANDIDATES, vocab_size)
    best = logits.topk(candidates, dim=-1).values
    floor, reached = _nucleus_floor(best, total, top_p)
    flat = (~reached).nonzero()[:, 0]
    if len(flat) and candidates < vocab_size:
        # A row whose mass is spread wide is sorted whole, and alone. numpy sorts ten times as fast as torch.
        ordered = torch.from_numpy(np.sort(logits[flat].cpu().numpy(), axis=-1)).to(logits.device).flip(-1)
        floor[flat] = _nucleus_floor(ordered, total[flat], top_p[flat])[0]
    return floor


def _nucleus_floor(best: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logit at which the mass of `best` [L, n], descending, reaches `top_p`, and whether it does."""
    mass = (best - total).exp().cumsum(dim=-1)
    needed = (mass < top_p[:, None]).sum(dim=-1).clamp_(max=best.shape[1] - 1)
    return best.gather(1, needed[:, None])[:, 0], mass[:, -1] >= top_p
