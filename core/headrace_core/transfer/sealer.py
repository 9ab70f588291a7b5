"""Makes pages that nothing writes any more ready to be read: copied to the host where need be, with their checksums.

Each page is copied and summed once for each of its generations: one of the prefix cache that many sequences share is
the same in all of them. Event loop only; the work is done on a thread of its own, before which steps go.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from headrace_core.kv.layout import KvLayout
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import checksums, run_to_its_end, yield_to_steps

MOST_RUN_BYTES = 8 << 20
"""What is moved and verified at a time. With `taker.MOST_PULLS` it bounds what is in flight to a taker."""

Pages = Sequence[tuple[int, int]]
"""(id, generation) of each."""


class Sealer:
    """See the module. One thread, so that a copy of a page comes after those that its earlier owners began."""

    def __init__(self, memory: PageMemory, layout: KvLayout, *, most_run_bytes: int = MOST_RUN_BYTES) -> None:
        self._memory = memory
        self._layers = range(layout.num_layers)
        self._most_pages = max(1, most_run_bytes // layout.page_bytes)
        self._thread = ThreadPoolExecutor(1, "seal", initializer=yield_to_steps)
        self._known: dict[int, tuple[int, array[int]]] = {}
        """Of each page id: the generation that was summed, and its checksums, by layer."""

    def parts(self, first_page: int, pages: Pages) -> Iterator[tuple[int, Pages]]:
        """Cut pages of a sequence, from `first_page` on, into what one run may have."""
        for start in range(0, len(pages), self._most_pages):
            yield first_page + start, pages[start : start + self._most_pages]

    async def seal(self, first_page: int, pages: Pages) -> Run:
        """Return the run of these pages, over all layers, ready to be read. Runs are done in the order of the calls."""
        unknown = [page for page in pages if self._known.get(page[0], (None,))[0] != page[1]]
        if unknown:
            sums = await run_to_its_end(self._thread, self._sum, [page_id for page_id, _ in unknown])
            for index, (page_id, generation) in enumerate(unknown):
                self._known[page_id] = generation, array("Q", [layer[index] for layer in sums])
        sums_of = [self._known[page_id][1] for page_id, _ in pages]
        return Run(
            first_layer=0,
            first_page=first_page,
            page_ids=tuple(page_id for page_id, _ in pages),
            generations=tuple(generation for _, generation in pages),
            checksums=tuple(tuple(of_page[layer] for of_page in sums_of) for layer in self._layers),
        )

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _sum(self, page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        self._memory.copy_to_host(page_ids, self._layers)
        return checksums(self._memory, self._layers, page_ids)
