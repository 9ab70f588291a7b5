"""Exact numerics, case by case: a token's logits and cached rows are the same bits however it was computed.

A case is a small network with a few sequences. Each is computed once alone, in one piece, in the roomiest pages; then
again as a random deployment would: with others in its steps, cut into prompts and single tokens, in pages of another
size, on another number of threads, by one worker or by two, from the first of which it moves to the second at some
token. Whatever differs in one bit fails the case.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from headrace_core.batch.step import Chunk
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from torch import Tensor

from tests.exactness.holder import Holder

FAMILIES = ("v3", "v2", "glm4-moe-lite", "mixtral", "qwen3-moe")
DTYPES = ("float32", "bfloat16")
_MOST_TOKENS = 40
# Where a tile of keys, a panel of rows or a page ends, and the next to it on both sides.
_BORDERS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129)


@dataclass
class Computed:
    """One sequence: logits of every token [tokens, V], and its cached rows by layer."""

    logits: Tensor
    rows: list[Tensor]

    def is_same(self, other: Computed) -> bool:
        """Return whether all bits are equal."""
        pairs = [(self.logits, other.logits), *zip(self.rows, other.rows, strict=True)]
        return all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Deployment:
    """How the sequences of a case are computed.

    Workers compute on `threads[worker]` threads; sequence i is computed by the first in the pieces `cuts[i]`, and by
    the last from piece `moves[i]` on.
    """

    page_size: int
    threads: Sequence[int]
    cuts: Sequence[Sequence[int]]
    moves: Sequence[int]


def tiny_model(
    family: str,
    dtype: str,
    folder: Path,
    numerics: Numerics = Numerics.EXACT,
    weights_dtype: WeightsDtype = WeightsDtype.AUTO,
) -> Model:
    """Return a tiny network of this family."""
    write_checkpoint(folder, TINY_CONFIGS[family])
    return load_model(folder, dtype=dtype, numerics=numerics, weights_dtype=weights_dtype)


def differing(family: str, dtype: str, folder: Path, seeds: Sequence[int]) -> list[int]:
    """Return those of these cases that are not the same; for processes beside each other, `folder` is for them all."""
    model = _model_of_this_process(family, dtype, folder / f"{family}-{dtype}-{os.getpid()}")
    return [seed for seed in seeds if not check(model, seed)]


@functools.lru_cache(1)
def _model_of_this_process(family: str, dtype: str, folder: Path) -> Model:
    return tiny_model(family, dtype, folder)


def check(model: Model, seed: int) -> bool:
    """Compute the case of this number both ways; return whether they are the same to the last bit."""
    dice = random.Random(seed)
    vocab = model.config.vocab_size
    sequences = [[dice.randrange(vocab) for _ in range(_length(dice))] for _ in range(dice.randint(1, 5))]
    alone = [compute(model, [tokens], _alone(tokens))[0] for tokens in sequences]
    together = compute(model, sequences, _random_deployment(dice, [len(each) for each in sequences]), dice)
    return all(a.is_same(b) for a, b in zip(alone, together, strict=True))


def _length(dice: random.Random) -> int:
    return dice.choice(_BORDERS) if dice.random() < 0.15 else dice.randint(1, _MOST_TOKENS)


def _alone(tokens: list[int]) -> Deployment:
    return Deployment(page_size=64, threads=(1,), cuts=[[len(tokens)]], moves=[1])


def _random_deployment(dice: random.Random, lengths: Sequence[int]) -> Deployment:
    cuts = [_cut(dice, length) for length in lengths]
    num_workers = dice.choice((1, 2))
    return Deployment(
        page_size=dice.choice((1, 2, 5, 16, 64)),
        threads=[dice.choice((1, 2, 3)) for _ in range(num_workers)],
        cuts=cuts,
        moves=[dice.randint(1, len(cut)) for cut in cuts],
    )


def _cut(dice: random.Random, count: int) -> list[int]:
    """Return the lengths of pieces, of `count` tokens in all; often single ones, as of an answer."""
    pieces: list[int] = []
    while count:
        pieces.append(1 if dice.random() < 0.4 else dice.randint(1, count))
        count -= pieces[-1]
    return pieces


def compute(
    model: Model, sequences: Sequence[list[int]], deployment: Deployment, dice: random.Random | None = None
) -> list[Computed]:
    """Compute all sequences, pieces of some of them in each step of a worker; without `dice` of all, in order."""
    lengths = [len(tokens) for tokens in sequences]
    holders = [Holder(model, deployment.page_size, lengths, num_threads, dice) for num_threads in deployment.threads]
    first, last = holders[0], holders[-1]
    done, num_done = [0] * len(sequences), [0] * len(sequences)
    where = [first] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    while waiting := [i for i, cut in enumerate(deployment.cuts) if num_done[i] < len(cut)]:
        worker = where[waiting[0] if dice is None else dice.choice(waiting)]
        at_hand = [i for i in waiting if where[i] is worker]
        chosen = at_hand if dice is None else dice.sample(at_hand, dice.randint(1, len(at_hand)))
        chunks: list[Chunk] = []
        for i in chosen:
            end = done[i] + deployment.cuts[i][num_done[i]]
            chunks.append(Chunk(i, sequences[i][done[i] : end], done[i], worker.pages[i], True))
            done[i], num_done[i] = end, num_done[i] + 1
        for i, found in zip(chosen, worker.step(chunks), strict=True):
            logits[i].append(found)
            if num_done[i] == deployment.moves[i] and worker is not last:
                last.take(i, worker, done[i])
                where[i] = last
    return [Computed(torch.cat(each), where[i].rows(i, lengths[i])) for i, each in enumerate(logits)]
