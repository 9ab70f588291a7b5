"""The memory of a page pool, as a transfer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class PageMemory(Protocol):
    """Memory of a page pool, as `KvCache` has it."""

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """Return one page of one layer: contiguous, writable, no copy."""
        ...

    def copy_to_host(self, page_ids: Sequence[int]) -> None:
        """Let `page_bytes` show what was computed into these pages. Not on the event loop."""
        ...

    def copy_from_host(self, page_ids: Sequence[int]) -> None:
        """Let what was written to `page_bytes` of these pages be computed with. Not on the event loop."""
        ...
