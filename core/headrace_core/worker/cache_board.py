"""What the prefix cache has, for those who watch: all of it to who is new, then what changed. Event loop only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from headrace.v1 import worker_service_pb2

MOST_HASHES = 1 << 16
"""In one report, half a megabyte. Who is new hears of the pages that were cached first, so of none without those before
it; who lags further behind than the log goes is new again."""


class CacheBoard:
    """Pages by their hashes (`kv/page_hash`)."""

    def __init__(self) -> None:
        self._cached: dict[int, None] = {}
        self._log: deque[tuple[int, bool]] = deque(maxlen=MOST_HASHES)
        self.position = 0
        """Changes so far."""

    def take(self, changes: Sequence[tuple[int, bool]]) -> None:
        """Take note of pages that are cached (True) or no more."""
        for page, is_cached in changes:
            if is_cached:
                self._cached[page] = None
            else:
                self._cached.pop(page, None)
        self._log.extend(changes)
        self.position += len(changes)

    def put(self, report: worker_service_pb2.WatchLoadResponse, position: int | None) -> int:
        """Add to a report what changed since `position`, None: everything; return the position to go on from."""
        if position is None or self.position - position > len(self._log):
            report.is_cache_whole = True
            report.pages_cached.extend(islice(self._cached, MOST_HASHES))
            return self.position
        start = len(self._log) - (self.position - position)
        for page, is_cached in dict(islice(self._log, start, None)).items():  # of each page the last word
            (report.pages_cached if is_cached else report.pages_evicted).append(page)
        return self.position
