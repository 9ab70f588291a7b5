"""The memory of a page pool: what it is made of, and how a transfer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from headrace_core.batch.step import Mark
from headrace_core.transfer.memfd import Memfd


class MemoryKind(Enum):
    """What the host's side of a pool is made of. Memory that a device pins, or the device's own, would be kinds too."""

    PLAIN = "plain"
    """The process's own."""
    MEMFD = "memfd"
    """Readable by those to whom this process passes a descriptor. For a transfer it is as good as plain memory."""


def new_memory(kind: MemoryKind) -> Memfd | None:
    """Return what a pool's memory is allocated from; None: plain memory, which nobody needs to know of."""
    return Memfd() if kind is MemoryKind.MEMFD else None


class PageMemory(Protocol):
    """Memory of a page pool, as `KvCache` has it."""

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """Return one page of one layer: contiguous, writable, no copy."""
        ...

    def host_layers(self) -> Sequence[memoryview]:
        """Return all that `page_bytes` shows, by layer: what a transport registers."""
        ...

    def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
        """Let `page_bytes` show what was computed into these layers of pages, until the mark. Not on the event loop."""
        ...

    def copy_from_host(self, page_ids: Sequence[int], layers: range) -> None:
        """Let what was written to `page_bytes` of these layers of pages be computed with. Not on the event loop."""
        ...
