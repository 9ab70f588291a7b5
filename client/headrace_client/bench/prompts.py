"""What is asked: sessions of turns, each a prompt by the tokens it shares with others, and how many tokens to answer.

A prompt is parts, and a part is a key and a length: equal keys begin with equal tokens, so what prompts share is seen
without making them, and a million of them take no memory until each is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIRST_TOKEN = 3
"""Smaller ids are the special tokens of most models."""

Key = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """`num_tokens` tokens that its key decides."""

    key: Key
    num_tokens: int

    def tokens(self, vocab_size: int) -> list[int]:
        """Return them: ids from `FIRST_TOKEN` to `vocab_size` - 1. A shorter part of the key is a prefix of these."""
        random = np.random.default_rng(self.key)
        drawn: list[int] = random.integers(FIRST_TOKEN, vocab_size, self.num_tokens, dtype=np.int64).tolist()
        return drawn


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session; its prompt begins with all of the session so far, the answers included."""

    parts: Sequence[Part]
    num_output: int

    @property
    def num_new_tokens(self) -> int:
        """Prompt tokens that this turn adds."""
        return sum(part.num_tokens for part in self.parts)

    def tokens(self, vocab_size: int) -> list[int]:
        """Return the tokens that this turn adds to the prompt."""
        return [token for part in self.parts for token in part.tokens(vocab_size)]


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that one client takes one after the other; most have one. `arrival_s` is a trace's, from its beginning."""

    turns: Sequence[Turn]
    arrival_s: float | None = None
