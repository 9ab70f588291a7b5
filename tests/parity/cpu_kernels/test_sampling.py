"""Tokens drawn by compiled code: the specification's, for odd vocabularies, hostile logits, any threads."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.draws import NO_TOKEN, Draws
from headrace_kernels.sampling import sample_tokens, sample_tokens_ref

from tests.parity.cpu_kernels.inputs import on_threads, random

ROWS = 16
INF, NAN = float("inf"), float("nan")


def draws(vocab_size: int) -> Draws:
    """Every filter on and off, alone and together; some rows are greedy."""
    return Draws(
        torch.rand(ROWS, dtype=torch.float64).mul(2).masked_fill(torch.arange(ROWS) % 7 == 0, 0.0),
        torch.randint(-1, vocab_size + 20, (ROWS,)).clamp(0),
        torch.rand(ROWS, dtype=torch.float64).mul(1.3).clamp(1e-9, 1.0),
        torch.rand(ROWS, dtype=torch.float64).sub(0.7).clamp(0.0),
        torch.randint(-(2**63), 2**63 - 1, (ROWS,)),
        torch.randint(0, 2**32, (ROWS,)),
        torch.randint(0, 2**32, (ROWS,)),
    )


KINDS = {
    "spread": lambda x: x,
    "many equal": lambda x: x.round_(),
    "all equal": lambda x: x.zero_(),
    "peaked": lambda x: x.mul_(1000),
    "forbidden": lambda x: x.masked_fill_(torch.rand(x.shape) < 0.4, -INF),
    "tiny": lambda x: x.mul_(1e-30),
    "far apart": lambda x: x.mul_(1e38),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 300, 4097])
def test_the_token_is_the_specifications(vocab_size, kind):
    for _ in range(6):
        logits, columns = KINDS[kind](random(ROWS, vocab_size, dtype=torch.float32, scale=3.0)), draws(vocab_size)
        assert sample_tokens(logits, columns).tolist() == sample_tokens_ref(logits, columns).tolist()


def test_a_row_that_leaves_no_choice_has_no_token_and_costs_its_neighbours_none():
    logits, columns = random(ROWS, 130, dtype=torch.float32), draws(130)
    expected = sample_tokens(logits, columns).tolist()
    for row, value in ((1, NAN), (2, INF)):
        for place in (0, 64, 128, 129):
            spoilt = logits.clone()
            spoilt[row, place] = value
            assert sample_tokens(spoilt, columns).tolist() == [
                NO_TOKEN if i == row else token for i, token in enumerate(expected)
            ]
    logits[3] = -INF
    assert sample_tokens(logits, columns)[3] == NO_TOKEN


def test_the_number_decides_and_every_token_that_may_be_drawn_is():
    columns = draws(4)
    even = Draws(
        torch.ones(4000, dtype=torch.float64),
        torch.full((4000,), 3),
        torch.ones(4000, dtype=torch.float64),
        torch.zeros(4000, dtype=torch.float64),
        columns.seeds[:1].repeat(4000),
        torch.zeros(4000, dtype=torch.int64),
        torch.arange(4000),
    )
    logits = torch.tensor([[0.0, 0.0, -INF, 0.0]]).repeat(4000, 1)
    counts = sample_tokens(logits, even).bincount(minlength=4).tolist()
    assert counts[2] == 0
    assert min(counts[0], counts[1], counts[3]) > 1200


def test_neither_threads_nor_neighbours_change_a_token():
    logits, columns = random(ROWS, 5000, dtype=torch.float32), draws(5000)
    expected = sample_tokens(logits, columns).tolist()
    for threads in (1, 2, 5):
        assert on_threads(threads, lambda: sample_tokens(logits, columns)).tolist() == expected
    for row in range(ROWS):
        alone = Draws(*(getattr(columns, name)[row : row + 1] for name in Draws.__slots__))
        assert sample_tokens(logits[row : row + 1], alone).tolist() == expected[row : row + 1]
