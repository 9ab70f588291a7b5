"""Exact numerics, case by case: a token's logits and cached rows are the same bits however it was computed.

A case is a small network with a few sequences. Each is computed once alone, in one piece, in the roomiest pages; then
again with others in its steps, cut at random into prompts and single tokens, in pages of another size, on another
number of threads. Whatever differs in one bit fails the case.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from headrace_core.batch.step import Chunk
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.numerics import Numerics
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from torch import Tensor

FAMILIES = ("v3", "v2", "glm4-moe-lite", "mixtral", "qwen3-moe")
DTYPES = ("float32", "bfloat16")
_MOST_TOKENS = 40


@dataclass
class Computed:
    """One sequence: logits of every token [tokens, V], and its cached rows by layer."""

    logits: Tensor
    rows: list[Tensor]

    def is_same(self, other: Computed) -> bool:
        """Return whether all bits are equal."""
        pairs = [(self.logits, other.logits), *zip(self.rows, other.rows, strict=True)]
        return all(torch.equal(a, b) for a, b in pairs)


def tiny_model(family: str, dtype: str, folder: Path, numerics: Numerics = Numerics.EXACT) -> Model:
    """Return a tiny network of this family."""
    write_checkpoint(folder, TINY_CONFIGS[family])
    return load_model(folder, dtype=dtype, numerics=numerics)


def check(model: Model, seed: int) -> bool:
    """Compute the case of this number both ways; return whether they are the same to the last bit."""
    dice = random.Random(seed)
    vocab = model.config.vocab_size
    sequences = [
        [dice.randrange(vocab) for _ in range(dice.randint(1, _MOST_TOKENS))] for _ in range(dice.randint(1, 5))
    ]
    torch.set_num_threads(1)
    alone = [compute(model, [tokens], [[len(tokens)]], page_size=64)[0] for tokens in sequences]
    cuts = [_cut(dice, len(tokens)) for tokens in sequences]
    torch.set_num_threads(dice.choice((1, 2, 3)))
    together = compute(model, sequences, cuts, page_size=dice.choice((1, 2, 5, 16, 64)), dice=dice)
    return all(a.is_same(b) for a, b in zip(alone, together, strict=True))


def _cut(dice: random.Random, count: int) -> list[int]:
    """Return the lengths of pieces, of `count` tokens in all; often single ones, as of an answer."""
    pieces: list[int] = []
    while count:
        pieces.append(1 if dice.random() < 0.4 else dice.randint(1, count))
        count -= pieces[-1]
    return pieces


def compute(
    model: Model,
    sequences: list[list[int]],
    cuts: list[list[int]],
    *,
    page_size: int,
    dice: random.Random | None = None,
) -> list[Computed]:
    """Compute all sequences over one cache, pieces of some of them in each step."""
    pages_each = -(-_MOST_TOKENS // page_size)
    cache = KvCache(model.kv_layout(page_size), pages_each * len(sequences), "cpu")
    order = list(range(pages_each * len(sequences)))
    if dice is not None:
        dice.shuffle(order)
    pages = [order[i * pages_each : (i + 1) * pages_each] for i in range(len(sequences))]
    done, left = [0] * len(sequences), [list(cut) for cut in cuts]
    logits: list[list[Tensor]] = [[] for _ in sequences]
    while any(left):
        waiting = [i for i, pieces in enumerate(left) if pieces]
        chosen = waiting if dice is None else dice.sample(waiting, dice.randint(1, len(waiting)))
        chunks: list[Chunk] = []
        for i in chosen:
            end = done[i] + left[i].pop(0)
            chunks.append(Chunk(i, sequences[i][done[i] : end], done[i], pages[i], True))
            done[i] = end
        for i, found in zip(chosen, model.all_logits(chunks, cache), strict=True):
            logits[i].append(found)
    return [
        Computed(torch.cat(each), _rows(model, cache, pages[i], len(sequences[i]), page_size))
        for i, each in enumerate(logits)
    ]


def _rows(model: Model, cache: KvCache, pages: list[int], count: int, page_size: int) -> list[Tensor]:
    """Return the cached rows of a sequence's tokens, by layer, in their order."""
    token_axis = 1 if cache.layers[0].ndim == 3 else 2
    rows = [layer[pages].movedim(token_axis, 1).flatten(0, 1)[:count] for layer in cache.layers]
    return [row.clone() for row in rows]
