"""What the tests of the sampler share: rows of a small vocabulary, and many draws."""

from __future__ import annotations

import torch
from headrace_core.batch.step import SamplingRow
from headrace_core.model.sampler import sample
from headrace_core.request import SamplingParams

VOCAB = 40


def row(prompt=(), output=(), *, sample_index=0, position=7, eos=(1,), **params):
    filled = SamplingParams(**{"seed": 11, **params})
    return SamplingRow(filled, list(prompt), list(output), sample_index, position, eos)


def some_logits(rows=1, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits, count=2000, **params):
    """Draw at `count` positions from the same logits."""
    rows = [row(position=position, **params) for position in range(count)]
    return [token.token_id for token in sample(logits.expand(count, -1), rows)]
