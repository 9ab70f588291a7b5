"""A number for each full page of a prompt, by which a router and workers speak of a prefix cache without its tokens.

A page's hash is over all tokens up to its end, so equal hashes are equal prefixes, but for a chance of 2^-64 per pair:
a hint for placement, and never what a cache finds pages by.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from headrace_core.request import token_words

NO_PAGES = 0
"""Hash of nothing, which the first page's is made from."""


def page_hash(parent: int, token_ids: Sequence[int]) -> int:
    """Return the hash of a page: xxh3_64 over its tokens, each 4 bytes little-endian, seeded with the page's before."""
    return xxhash.xxh3_64_intdigest(token_words(token_ids).tobytes(), seed=parent)


def page_hashes(token_ids: Sequence[int], page_size: int) -> list[int]:
    """Return the hash of every full page, in order."""
    hashes: list[int] = []
    parent = NO_PAGES
    data, page_bytes = token_words(token_ids).tobytes(), 4 * page_size
    for start in range(0, len(data) - page_bytes + 1, page_bytes):
        parent = xxhash.xxh3_64_intdigest(data[start : start + page_bytes], seed=parent)
        hashes.append(parent)
    return hashes
