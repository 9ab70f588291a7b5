"""Stop strings, found across token borders.

Text that may be the beginning of a stop string is held back until it is one or can't be. The matcher is an
Aho-Corasick automaton: its state is the longest suffix of the text that begins a stop string, so what to hold back is
the state's depth, and each character costs O(1) whatever the number of stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    depth: int
    edges: dict[str, _Node] = field(default_factory=dict[str, "_Node"])
    fail: _Node | None = None
    match: str = ""
    """The longest stop string that ends here."""


class StopMatcher:
    """Searches one sample's text. The match that is complete first wins; of those, the longest."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Build the automaton: O(total characters)."""
        self._root = _build(stop_strings)
        self._state = self._root
        self._held = ""
        self.matched = ""
        """The stop string found; empty until then."""

    def push(self, text: str) -> str:
        """Take more text and return what can be shown; after a match, what came before it and then nothing more."""
        if self.matched or not text:
            return ""
        state = self._state
        for i, char in enumerate(text):
            state = _next(state, char, self._root)
            if state.match:
                self.matched = state.match
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen[: len(seen) - len(state.match)]
        self._state = state
        seen = self._held + text
        num_shown = len(seen) - state.depth
        self._held = seen[num_shown:]
        return seen[:num_shown]

    def finish(self) -> str:
        """Return the text still held back: no more is coming."""
        held, self._held = self._held, ""
        return held


def _next(state: _Node, char: str, root: _Node) -> _Node:
    node: _Node | None = state
    while node is not None:
        after = node.edges.get(char)
        if after is not None:
            return after
        node = node.fail
    return root


def _build(stop_strings: Sequence[str]) -> _Node:
    root = _Node(0)
    for text in stop_strings:
        node = root
        for char in text:
            node = node.edges.setdefault(char, _Node(node.depth + 1))
        node.match = text
    queue = deque(root.edges.values())
    for child in queue:
        child.fail = root
    while queue:
        node = queue.popleft()
        for char, child in node.edges.items():
            child.fail = _next(node.fail or root, char, root)
            child.match = child.match or child.fail.match
            queue.append(child)
    return root
