"""What others take of this worker's prefix cache: references to its pages while they read. Pure; engine thread only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from headrace_core.kv.sequence_pages import PageAllocator, SequencePages


@dataclass(frozen=True, slots=True)
class PrefixHeld:
    """The first `num_tokens` of what was asked for are cached, and held; `pages`: (id, generation) of those wanted."""

    hold: int
    num_tokens: int
    pages: tuple[tuple[int, int], ...]


class HeldPrefixes:
    """Each under its caller's number, from `hold` to `let_go`."""

    def __init__(self, pages: PageAllocator, tell: Callable[[PrefixHeld], None]) -> None:
        self._pages = pages
        self._tell = tell
        self._held: dict[int, SequencePages] = {}

    @property
    def held(self) -> Iterable[SequencePages]:
        """All that is referred to."""
        return self._held.values()

    def hold(self, number: int, token_ids: Sequence[int], *, num_have_pages: int) -> None:
        """Keep what is cached of `token_ids`, and tell of its pages but the first `num_have_pages`."""
        found = self._held[number] = self._pages.match_longest(number, token_ids, num_left=0)
        generation = self._pages.pool.generation
        wanted = tuple((page_id, generation(page_id)) for page_id in found.page_ids[num_have_pages:])
        self._tell(PrefixHeld(number, len(found.page_ids) * self._pages.page_size, wanted))

    def let_go(self, number: int) -> None:
        """Keep it no longer; an unknown one is no error."""
        found = self._held.pop(number, None)
        if found is not None:
            self._pages.free(found)
