"""The text of one sample, from its tokens: decoded, and ended where a stop string says so.

A stop string is looked for in the text of the tokens that come after the first `min_tokens`. One that is the text of a
special token, which an answer does not show, is found by that token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace_router.text.detokenizer import Detokenizer
from headrace_router.text.stop import StopMatcher


class Assembler:
    """`push` each token in order, then `finish` once; the texts, joined, are what the client is shown."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        special_stops: Mapping[int, str] | None = None,
    ) -> None:
        """Args: `special_stops` are the stop strings that are special tokens' texts, by the token."""
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stop_strings) if stop_strings else None
        self._num_free = min_tokens
        """Tokens that are still to come whose text ends nothing."""
        self._special_stops = special_stops or {}
        self.matched = ""
        """The stop string found; empty until then."""
        self.plain_push = None if stop_strings or special_stops else detokenizer.push
        """`push`, where nothing can be matched; None where something can."""

    def push(self, token_id: int) -> str:
        """Take a token, and return the text that is now certain; after a match, what came before it."""
        is_free = self._num_free > 0
        self._num_free -= is_free
        text = self._detokenizer.push(token_id)
        if not is_free:
            self.matched = self._special_stops.get(token_id, "")
            text = self._search(text)
        return text

    def finish(self) -> str:
        """Return the text that was held back: no token is coming. It may complete a stop string, too."""
        if self._stop is None:
            return self._detokenizer.finish()
        if self._stop.matched:
            return ""
        text = self._detokenizer.finish()
        return (text if self._num_free > 0 else self._search(text)) + self._stop.finish()

    def _search(self, text: str) -> str:
        if self._stop is None:
            return text
        text = self._stop.push(text)
        self.matched = self._stop.matched or self.matched
        return text
