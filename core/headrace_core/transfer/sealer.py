"""Makes pages that nothing writes any more ready to be read: copied to the host where need be, with their checksums.

Each page is copied and summed once for each of its generations, its first layers maybe before its last are computed:
one of the prefix cache that many sequences share is the same in all of them. Event loop only; the work is done on a
thread of its own, before which steps go.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from headrace_core.batch.step import Mark
from headrace_core.kv.layout import KvLayout
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import checksums, run_to_its_end, yield_to_steps

MOST_RUN_BYTES = 16 << 20
"""What is moved and verified at a time: over gRPC each is a call, which costs some 2 ms of CPU. It bounds what is in
flight to a taker, with `taker.MOST_PULLS`."""

Pages = Sequence[tuple[int, int]]
"""(id, generation) of each."""


class Sealer:
    """See the module. One thread, so that a copy of a page comes after those that its earlier owners began."""

    def __init__(self, memory: PageMemory, layout: KvLayout, *, most_run_bytes: int = MOST_RUN_BYTES) -> None:
        self._memory = memory
        self._page_layer_bytes = layout.page_layer_bytes
        self._most_run_bytes = most_run_bytes
        self._thread = ThreadPoolExecutor(1, "seal", initializer=yield_to_steps)
        self._known: dict[int, tuple[int, array[int]]] = {}
        """Of each page id: the generation that was summed, and the checksums of its first layers."""

    def parts(self, first_page: int, pages: Pages, *, num_layers: int) -> Iterator[tuple[int, Pages]]:
        """Cut pages of a sequence, from `first_page` on, into what one run of so many layers may have."""
        most_pages = max(1, self._most_run_bytes // (num_layers * self._page_layer_bytes))
        for start in range(0, len(pages), most_pages):
            yield first_page + start, pages[start : start + most_pages]

    async def seal(self, first_page: int, pages: Pages, layers: range, mark: Mark | None = None) -> Run:
        """Return the run of these layers of these pages, ready to be read. Runs are done in the order of the calls.

        A page's layers are sealed from the first on. `mark`: what copying them waits for.
        """
        unknown = [page for page in pages if self._num_known(page) < layers.stop]
        if unknown:
            first = min(map(self._num_known, unknown))
            sums = await run_to_its_end(
                self._thread, self._sum, [page_id for page_id, _ in unknown], range(first, layers.stop), mark
            )
            for index, page in enumerate(unknown):
                self._keep(page, first, [layer[index] for layer in sums])
        sums_of = [self._known[page_id][1] for page_id, _ in pages]
        return Run(
            first_layer=layers.start,
            first_page=first_page,
            page_ids=tuple(page_id for page_id, _ in pages),
            generations=tuple(generation for _, generation in pages),
            checksums=tuple(tuple(of_page[layer] for of_page in sums_of) for layer in layers),
        )

    def _num_known(self, page: tuple[int, int]) -> int:
        """Return of how many first layers of a page, in its generation, the sums are kept."""
        generation, sums = self._known.get(page[0], (None, ()))
        return len(sums) if generation == page[1] else 0

    def _keep(self, page: tuple[int, int], first_layer: int, sums: Sequence[int]) -> None:
        num_known = self._num_known(page)
        assert num_known >= first_layer, "sums are kept in the order of the calls"
        kept = self._known[page[0]][1] if num_known else array("Q")
        kept.extend(sums[num_known - first_layer :])
        self._known[page[0]] = page[1], kept

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _sum(self, page_ids: Sequence[int], layers: range, mark: Mark | None) -> tuple[tuple[int, ...], ...]:
        self._memory.copy_to_host(page_ids, layers, mark)
        return checksums(self._memory, layers, page_ids)
