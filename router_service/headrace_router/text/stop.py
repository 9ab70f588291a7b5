"""Stop strings, found across token borders.

Text that may be the beginning of a stop string is held back until it is one or can't be. Nothing is built for a
request: whatever the stop strings are, a sample costs what it is to keep its tail and to look for them in it, in C.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Searches one sample's text. The match that is complete first wins; of those, the longest."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Search for `stop_strings`, none of them empty."""
        self._stop_strings = stop_strings
        self._held = ""
        self.matched = ""
        """The stop string found; empty until then."""

    def push(self, text: str) -> str:
        """Take more text and return what can be shown; after a match, what came before it and then nothing more."""
        if self.matched or not text:
            return ""
        seen, self._held = self._held + text, ""
        found = [(at + len(stop), -len(stop), stop) for stop in self._stop_strings if (at := seen.find(stop)) >= 0]
        if found:
            end, _, self.matched = min(found)
            return seen[: end - len(self.matched)]
        num_shown = len(seen) - max(_num_begun(seen, stop) for stop in self._stop_strings)
        self._held = seen[num_shown:]
        return seen[:num_shown]

    def finish(self) -> str:
        """Return the text still held back: no more is coming."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """Return with how many of its first characters, not all, `text` ends."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
