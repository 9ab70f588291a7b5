"""Keeps what users and tools wrote from being read as control tokens, such as the one that ends a message.

As a rule it is read so, as transformers does: a template's text and a user's are one text to a tokenizer. Here each
occurrence of a token's text in a user's words gets a character without width behind its first one, so that it is that
token's no more: the model reads nearly the same words, and an order only where the template wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

_BREAK = "\u200b"
PLAIN_ROLES = frozenset({"user", "tool"})
"""Whose words are plain: the others' are the application's and the model's own."""


class PlainText:
    """Makes values plain; with no `control_texts` they stay as they are."""

    def __init__(self, control_texts: Sequence[str]) -> None:
        longest_first = sorted((text for text in control_texts if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def of(self, value: Any) -> Any:
        """Return JSON's `value` with every text in it made plain."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._text(value, self._pattern)
        if isinstance(value, list):
            return [self.of(each) for each in cast("list[Any]", value)]
        if isinstance(value, dict):
            return {self.of(name): self.of(each) for name, each in cast("dict[str, Any]", value).items()}
        return value

    def _text(self, text: str, pattern: re.Pattern[str]) -> str:
        while pattern.search(text):  # one token's text may begin within another's
            text = pattern.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text)
        return text
