"""Training rows without end: stories, chats, and at first many plain repetitions.

A row holds whole documents from its first token on; the last one is cut where the row ends. The
loss of each target token carries a weight: a hero's name counts little where it first appears,
because nobody could know it, and more wherever it comes back, because copying it is what the model
is for. Repetitions (a random run of tokens, again and again) teach the copying itself: without
them it takes millions of tokens to appear.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from headrace_demo.story_grammar import Story, write_story
from headrace_demo.tokenizer import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER

_CHAT_SHARE = 0.5
_FIRST_NAME_WEIGHT = 0.2
_LATER_NAME_WEIGHT = 2.0


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch."""

    ids: Tensor
    """[B, T+1] int64."""
    weights: Tensor
    """[B, T] float32; how much the loss of predicting `ids[:, 1:]` counts, 0 for padding."""


Document = tuple[list[int], list[float]]


def repeat_share(progress: float) -> float:
    """Return the share of repetitions at `progress` (0 to 1) of a run: half, then few, then none."""
    if progress < 0.04:
        return 0.5
    return max(0.0, 0.5 * (0.15 - progress) / 0.11, 0.05 * (progress < 0.5))


def _weigh(ids: list[int], name: list[int]) -> list[float]:
    weights = [1.0] * len(ids)
    seen = False
    for i in range(len(ids) - len(name) + 1):
        if ids[i] == name[0] and ids[i : i + len(name)] == name:
            value = _LATER_NAME_WEIGHT if seen else _FIRST_NAME_WEIGHT
            weights[i : i + len(name)] = [value] * len(name)
            seen = True
    return weights


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Cut `text` into token ids without adding special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def story_document(tokenizer: Tokenizer, story: Story, *, as_chat: bool) -> Document:
    """Return the ids of `story`, from BOS to EOS, and the weight of each id as a target."""
    text = encode(tokenizer, story.text)
    asked = [USER, *encode(tokenizer, story.request), ASSISTANT] if as_chat else []
    ids = [BOS, *asked, *text, EOS]
    return ids, _weigh(ids, encode(tokenizer, f" {story.hero}"))


def _repetition(rng: Random, vocab_size: int) -> Document:
    run = [rng.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(rng.randint(4, 48))]
    copies = rng.randint(2, 4)
    return [BOS, *run * copies, EOS], [0.0] * (len(run) + 1) + [1.0] * (len(run) * (copies - 1) + 1)


class RowStream:
    """Makes batches; the same seed and the same calls give the same rows."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._rng = Random(seed)
        self._num_tokens = num_tokens

    def _document(self, share: float) -> Document:
        if self._rng.random() < share:
            return _repetition(self._rng, self._tokenizer.get_vocab_size())
        as_chat = self._rng.random() < _CHAT_SHARE
        return story_document(self._tokenizer, write_story(self._rng), as_chat=as_chat)

    def _row(self, share: float) -> Document:
        ids, weights = self._document(share)
        while len(ids) <= self._num_tokens:
            more = self._document(share)
            ids, weights = ids + more[0], weights + more[1]
        return ids[: self._num_tokens + 1], weights[: self._num_tokens + 1]

    def next_rows(self, num_rows: int, *, share_of_repeats: float = 0.0) -> Rows:
        """Make `num_rows` rows of T tokens and one more."""
        rows = [self._row(share_of_repeats) for _ in range(num_rows)]
        ids = torch.tensor([row[0] for row in rows])
        return Rows(ids, torch.tensor([row[1] for row in rows])[:, 1:])


def validation_rows(tokenizer: Tokenizer, *, num_tokens: int, num_rows: int = 48) -> Rows:
    """Make rows of one story each, never trained on, padded with EOS at weight 0."""
    rng = Random(999_983)
    ids = torch.full((num_rows, num_tokens + 1), EOS)
    weights = torch.zeros(num_rows, num_tokens)
    for row in range(num_rows):
        story = write_story(rng)
        document, _ = story_document(tokenizer, story, as_chat=row % 2 == 0)
        document = document[: num_tokens + 1]
        ids[row, : len(document)] = torch.tensor(document)
        weights[row, : len(document) - 1] = 1.0
    return Rows(ids, weights)
