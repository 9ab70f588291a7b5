"""`headrace_kernels.sampling` in plain torch: each row pays for what it asks for itself."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from headrace_kernels.counter_random import uniforms
from headrace_kernels.draws import NO_TOKEN, Draws
from headrace_kernels.sampling import pick, tempered

_NUCLEUS_CANDIDATES = 1024


def sample_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """See `headrace_kernels.sampling.sample_tokens`."""
    is_answerable = logits.amax(dim=-1).isfinite()  # NaN wins every comparison
    tokens = logits.argmax(dim=-1).masked_fill_(~is_answerable, NO_TOKEN)
    drawn = ((draws.temperatures > 0) & is_answerable).nonzero()[:, 0]
    if len(drawn):
        columns = Draws(*(getattr(draws, field.name)[drawn] for field in fields(Draws)))
        scaled = tempered(logits[drawn], columns.temperatures)
        kept = filter_logits(scaled, columns.top_k, columns.top_p, columns.min_p)
        tokens[drawn] = pick(kept, uniforms(columns.seeds, columns.sample_indices, columns.positions))
    return tokens


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
