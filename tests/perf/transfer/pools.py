"""What is moved: pages as a V3-shaped worker has them, in runs as a holder seals them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace_core.batch.step import Mark
from headrace_core.config import WorkerSettings
from headrace_core.errors import HeadraceError
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.sealer import MOST_RUN_BYTES
from headrace_core.transfer.transport import Reading
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import checksums

PAGE_BYTES = 64 * 576 * 2
"""64 tokens of a latent of 576 values in bfloat16: 72 KiB."""
NUM_LAYERS = 8
NUM_PAGES = 455
"""With `NUM_LAYERS`: 256 MiB."""
LAYER_BYTES = NUM_PAGES * PAGE_BYTES
INCARNATION = 42
FRAME_BYTES = WorkerSettings.model_fields["frame_kib"].default << 10
"""Of our gRPC transport and of its raw peers."""


class Pool:
    """`PageMemory` of `NUM_LAYERS` × `NUM_PAGES` pages; shared memory if `shared`."""

    def __init__(self, shared: Memfd | None = None) -> None:
        self.buffers = shared.allocate(NUM_LAYERS, LAYER_BYTES) if shared else [_plain() for _ in range(NUM_LAYERS)]

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """See `PageMemory`."""
        return self.buffers[layer][page_id * PAGE_BYTES : (page_id + 1) * PAGE_BYTES]

    def host_layers(self) -> Sequence[memoryview]:
        """See `PageMemory`."""
        return self.buffers

    def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
        """See `PageMemory`."""

    def copy_from_host(self, page_ids: Sequence[int], layers: range) -> None:
        """See `PageMemory`."""

    def fill(self) -> None:
        """Make every page another one, the same in each process."""
        pattern = bytes(range(251)) * (PAGE_BYTES // 251 + 2)
        for layer in range(NUM_LAYERS):
            for page in range(NUM_PAGES):
                start = (layer * NUM_PAGES + page) % 251
                self.page_bytes(layer, page)[:] = pattern[start : start + PAGE_BYTES]
                self.page_bytes(layer, page)[:8] = (layer * NUM_PAGES + page).to_bytes(8, "little")

    def pieces(self, num_bytes: int) -> Iterator[memoryview]:
        """Yield the pool from its beginning in pieces of a frame, `num_bytes` in all."""
        for buffer in self.buffers:
            for start in range(0, LAYER_BYTES, FRAME_BYTES):
                piece = buffer[start : min(start + FRAME_BYTES, LAYER_BYTES)][:num_bytes]
                num_bytes -= len(piece)
                if len(piece):
                    yield piece


class EveryPage:
    """`LeaseHolder` of a lease that has every page of the pool, in order."""

    def held_pages(
        self, reading: Reading, *, first_layer: int, num_layers: int, first_page: int, num_pages: int
    ) -> Sequence[int]:
        """See `LeaseHolder`."""
        if reading.incarnation != INCARNATION:
            raise HeadraceError("BUG", "another process's")
        return range(first_page, first_page + num_pages)


@dataclass(frozen=True, slots=True)
class Size:
    """An amount that is moved at once."""

    name: str
    num_layers: int
    num_pages: int
    num_repeats: int
    """In one round."""

    @property
    def num_bytes(self) -> int:
        """Of all its pages."""
        return self.num_layers * self.num_pages * PAGE_BYTES

    def runs(self, pool: Pool) -> list[Run]:
        """Return it in runs no larger than a holder seals."""
        most = max(1, MOST_RUN_BYTES // (self.num_layers * PAGE_BYTES))
        layers, runs = range(self.num_layers), list[Run]()
        for first in range(0, self.num_pages, most):
            ids = tuple(range(first, min(first + most, self.num_pages)))
            runs.append(Run(0, first, ids, (0,) * len(ids), checksums(pool, layers, ids)))
        return runs


SIZES = (Size("70KB", 1, 1, 40), Size("1MiB", 1, 14, 20), Size("256MiB", NUM_LAYERS, NUM_PAGES, 1))


def _plain() -> memoryview:
    return memoryview(mmap.mmap(-1, LAYER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
