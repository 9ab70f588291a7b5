"""How much of a prompt a worker has, by what the worker says of its prefix cache. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from typing import Any, Protocol

import xxhash
from headrace_core.kv.page_hash import page_hashes

_KEY_TOKENS = 64


def prefix_key(token_ids: Sequence[int]) -> int:
    """Return a number that is equal for equal first tokens, `_KEY_TOKENS` of them."""
    return xxhash.xxh3_64_intdigest(array("q", token_ids[:_KEY_TOKENS]).tobytes())


class Beginnings(Protocol):
    """Whatever can be looked for in a prefix cache; the simulator has its own, for prompts without tokens."""

    def num_cached_tokens(self, cached: Any, page_size: int) -> int:
        """Return how many of the first tokens a cache has."""
        ...


class Prefix:
    """A prompt's beginnings. Hashed when a cache is asked about first, and once for each size of pages."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.key = prefix_key(token_ids)
        """See `prefix_key`."""
        self._token_ids = token_ids
        self._hashes: dict[int, list[int]] = {}

    def num_cached_tokens(self, cached: Set[int], page_size: int) -> int:
        """Return how many of the first tokens are in a cache whose pages have these hashes; one is left to compute."""
        if not cached:
            return 0
        hashes = self._hashes.get(page_size)
        if hashes is None:
            hashes = self._hashes[page_size] = page_hashes(self._token_ids[:-1], page_size)
        # A page is cached only with those before it, so the first that is missing can be looked for by halves.
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in cached:
                low = middle
            else:
                high = middle - 1
        return low * page_size


NO_PREFIX = Prefix(())
"""Of a prompt that nobody is to look for."""
