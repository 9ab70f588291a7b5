"""Parts of a hand-off for tests of one of them: memory, a holder told what to say, a run, a copy that stops.

Ships with the product, and says so. No torch, no engine, no pool.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from headrace_core.batch.step import Mark
from headrace_core.errors import HeadraceError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Holding, LeaseHolder, Reading
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import checksums

INCARNATION = 42


class PlainMemory:
    """`PageMemory` of bytes, page by page different.

    `copies` are the calls of `copy_to_host` and `copy_from_host`: which, pages, layers; `marks` those of the former.
    With `shared` the bytes are of memory that others can be let read.
    """

    def __init__(
        self,
        *,
        num_layers: int = 2,
        num_pages: int = 8,
        page_bytes: int = 64,
        seed: int = 1,
        shared: Memfd | None = None,
    ) -> None:
        size = num_pages * page_bytes
        plain = [memoryview(bytearray(size)) for _ in range(num_layers)]
        buffers = shared.allocate(num_layers, size) if shared else plain
        starts = range(0, size, page_bytes)
        self._buffers = buffers
        self._pages = [[buffer[start : start + page_bytes] for start in starts] for buffer in buffers]
        for layer, pages in enumerate(self._pages):
            for page, content in enumerate(pages):
                content[:] = _counting(seed * 89 + layer * 31 + page * 7, page_bytes)
        self.copies: list[tuple[str, tuple[int, ...], range]] = []
        self.marks: list[Mark | None] = []

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """See `PageMemory`."""
        return self._pages[layer][page_id]

    def host_layers(self) -> Sequence[memoryview]:
        """See `PageMemory`."""
        return self._buffers

    def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
        """See `PageMemory`."""
        self.copies.append(("to_host", tuple(page_ids), layers))
        self.marks.append(behind)

    def copy_from_host(self, page_ids: Sequence[int], layers: range) -> None:
        """See `PageMemory`."""
        self.copies.append(("from_host", tuple(page_ids), layers))

    def content(self, page_ids: Sequence[int]) -> list[list[bytes]]:
        """Return the bytes of these pages, [layers][pages]."""
        return [[bytes(layer[page_id]) for page_id in page_ids] for layer in self._pages]


class StubHolder:
    """`LeaseHolder` of one lease. After `num_good_looks` at its pages, every look raises `error`."""

    def __init__(self, page_ids: Sequence[int], *, error: HeadraceError | None = None, num_good_looks: int = 0) -> None:
        self._page_ids = tuple(page_ids)
        self._error = error
        self._num_good_looks = num_good_looks
        self.looks: list[tuple[Reading, tuple[int, int, int, int]]] = []

    def held_pages(
        self, reading: Reading, *, first_layer: int, num_layers: int, first_page: int, num_pages: int
    ) -> Sequence[int]:
        """See `LeaseHolder`."""
        self.looks.append((reading, (first_layer, num_layers, first_page, num_pages)))
        if self._error and len(self.looks) > self._num_good_looks:
            raise self._error
        return self._page_ids


def holding(
    holder: LeaseHolder,
    memory: PageMemory,
    *,
    frame_bytes: int,
    on_sent: Callable[[int], None],
    shared: Memfd | None = None,
) -> Holding:
    """Return what a holder's end of a transport serves."""
    return Holding(
        holder=lambda: holder,
        memory=lambda: memory,
        incarnation=INCARNATION,
        frame_bytes=frame_bytes,
        on_sent=on_sent,
        shared=lambda: shared,
    )


def run_of(memory: PlainMemory, page_ids: Sequence[int], *, num_layers: int = 2) -> Run:
    """Return a sealed run of pages of `memory`, from a sequence's first page on."""
    return Run(0, 0, tuple(page_ids), (0,) * len(page_ids), checksums(memory, range(num_layers), page_ids))


def _counting(first: int, num_bytes: int) -> bytearray:
    return bytearray((first + offset) % 251 for offset in range(num_bytes))


class StoppedCopy:
    """Stops who copies into the pages of a taker's `memory`, at the first one, until told to go on."""

    def __init__(self, memory: Any) -> None:
        self._reached, self._go_on = threading.Event(), threading.Event()
        page_bytes = memory.page_bytes

        def stopping(layer: int, page_id: int) -> memoryview:
            if threading.current_thread().name.startswith("verify"):
                self._reached.set()
                assert self._go_on.wait(WAIT_S), f"a copy was stopped for {WAIT_S} s"
            return page_bytes(layer, page_id)

        memory.page_bytes = stopping

    async def reached(self) -> None:
        """Return when somebody copies."""
        assert await asyncio.to_thread(self._reached.wait, WAIT_S), f"no copy came within {WAIT_S} s"

    def go_on(self) -> None:
        """Stop nobody any more."""
        self._go_on.set()
