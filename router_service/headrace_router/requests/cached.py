"""Where the first of a sequence's tokens are in a prefix cache: what a placement prefers. A hint, and no promise.

The router remembers which decode worker finished which tokens: the next turn of a conversation begins with them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace_core.request import token_words

from headrace_router.fleet.worker import Worker

MOST_FINISHED = 1024
"""Sequences that are remembered, the last ones."""
FIRST_TOKENS = 16
"""Those that begin otherwise are not looked at for a prompt."""


@dataclass(frozen=True, slots=True)
class Cached:
    """A decode worker that had the full pages of a sequence's first `num_tokens`, and may have evicted them since."""

    worker: Worker
    num_tokens: int

    @property
    def is_lost(self) -> bool:
        """True if the worker's connection is gone: whoever is at that address now, nothing is known of its cache."""
        return self.worker.lost.done()


@dataclass(frozen=True, slots=True)
class Kept:
    """A decode worker that goes away keeps the pages of a sequence that ran there, until it runs elsewhere."""

    worker: Worker
    number: int
    attempt: int
    """The sequence's there."""
    release: Callable[[], None]
    """Gives back what is reserved there."""

    def let_go(self) -> None:
        """Let the worker keep nothing any more; once."""
        self.worker.session.end(self.number, self.attempt, tell=True)
        self.release()


def cached_at(worker: Worker, num_tokens: int) -> Cached:
    """Return what a worker has that computed or took `num_tokens` but the last: its full pages."""
    page_size = worker.layout.page_size
    return Cached(worker, (num_tokens - 1) // page_size * page_size)


class Finished:
    """Sequences that ended well, by the hash of the tokens that are cached of them. Event loop only.

    What a prompt begins with is looked for among those with the same first tokens.
    """

    def __init__(self, most: int = MOST_FINISHED) -> None:
        self._most = most
        self._by_hash: OrderedDict[bytes, tuple[tuple[int, ...], Cached]] = OrderedDict()
        """The first tokens, and where; the longest unused first."""
        self._lengths: dict[tuple[int, ...], Counter[int]] = {}
        """By the first tokens: how many there are of each number of tokens."""

    def __len__(self) -> int:
        return len(self._by_hash)

    def remember(self, first_ids: Sequence[int], tokens_sha256: bytes, cached: Cached) -> None:
        """Take note of `cached`: its tokens' first ones, and `hash_tokens` of all of them. The last word counts."""
        self._forget(tokens_sha256)
        first = tuple(first_ids[:FIRST_TOKENS])
        self._by_hash[tokens_sha256] = first, cached
        self._lengths.setdefault(first, Counter())[cached.num_tokens] += 1
        if len(self._by_hash) > self._most:
            self._forget(next(iter(self._by_hash)))

    def find(self, token_ids: Sequence[int]) -> Cached | None:
        """Return where the longest beginning of `token_ids` is that leaves a token, if any is known.

        Takes a pass over the tokens, as hashing them does, where something with the same first ones is known.
        """
        found: bytes | None = None
        digest, start = hashlib.sha256(), 0
        for length in sorted(self._lengths.get(tuple(token_ids[:FIRST_TOKENS]), ())):
            if length >= len(token_ids):
                break
            digest.update(token_words(token_ids[start:length]))
            start = length
            tokens_sha256 = digest.digest()
            if tokens_sha256 in self._by_hash:
                if self._by_hash[tokens_sha256][1].is_lost:
                    self._forget(tokens_sha256)
                else:
                    found = tokens_sha256
        if found is None:
            return None
        self._by_hash.move_to_end(found)
        return self._by_hash[found][1]

    def _forget(self, tokens_sha256: bytes) -> None:
        first, cached = self._by_hash.pop(tokens_sha256, ((), None))
        if cached is None:
            return
        lengths = self._lengths[first]
        lengths[cached.num_tokens] -= 1
        if not lengths[cached.num_tokens]:
            del lengths[cached.num_tokens]
        if not lengths:
            del self._lengths[first]
