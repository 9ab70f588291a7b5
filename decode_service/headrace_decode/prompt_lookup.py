"""A draft without a model: what followed the last time that the sequence's newest tokens stood in it. Pure.

Answers that quote their prompt, change a text a little or fall into a pattern are guessed well, others not at all.

Source: Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FEWEST, _MOST = 2, 8
"""So many of the newest tokens must have stood there, at least; more than that make no better guess."""
_TRIED = 256
"""Places of the newest token that are looked at, the last ones."""


class PromptLookup:
    """One sequence's, whose tokens only grow."""

    __slots__ = ("_size", "_tokens")

    def __init__(self) -> None:
        self._tokens = np.empty(0, dtype=np.int32)
        self._size = 0

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return what may follow `token_ids`, at most `count` tokens; none if their end never stood there before.

        Of all places the one where most of the newest tokens stood, up to `_MOST`; of several the last. Takes a
        comparison of all tokens with one, and little more.
        """
        self._catch_up(token_ids)
        known = self._tokens[: self._size]
        most, place = _FEWEST - 1, -1
        for end in reversed(np.flatnonzero(known[:-1] == known[-1])[-_TRIED:].tolist()):
            length = 1
            while length < _MOST and length <= end and token_ids[end - length] == token_ids[-1 - length]:
                length += 1
            if length > most:
                most, place = length, end
            if most == _MOST:
                break
        if place < 0:
            return []
        # A place so near that what followed ends goes on as it began: the text goes round.
        period = len(known) - 1 - place
        return known[place + 1 + np.arange(count) % period].tolist()

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        size = len(token_ids)
        if size > len(self._tokens):
            tokens = np.empty(2 * size, dtype=np.int32)
            tokens[: self._size] = self._tokens[: self._size]
            self._tokens = tokens
        self._tokens[self._size : size] = token_ids[self._size :]
        self._size = size
