"""Where the first of a sequence's tokens are in a prefix cache: what a placement prefers. A hint, and no promise."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_router.worker import Worker


@dataclass(frozen=True, slots=True)
class Cached:
    """A decode worker that had the full pages of a sequence's first `num_tokens`, and may have evicted them since."""

    worker: Worker
    num_tokens: int

    @property
    def is_lost(self) -> bool:
        """True if the worker's connection is gone: whoever is at that address now, nothing is known of its cache."""
        return self.worker.lost.done()


def cached_at(worker: Worker, num_tokens: int) -> Cached:
    """Return what a worker has that computed or took `num_tokens` but the last: its full pages."""
    page_size = worker.layout.page_size
    return Cached(worker, (num_tokens - 1) // page_size * page_size)
