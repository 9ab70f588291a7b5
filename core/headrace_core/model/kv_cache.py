"""The tensors that hold pages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from headrace_core.batch.step import Mark
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.kv.layout import KvLayout
from headrace_core.model.host_copies import to_device
from headrace_core.model.page_ring import PageRing, page_rows

T = TypeVar("T")

Allocate = Callable[[int, int], Sequence[memoryview]]
"""Gives, for (layers, bytes of each), a buffer for each layer: writable, and zero."""


class KvCache:
    """Memory of a pool of pages: one tensor [num_pages, *page_shape] per layer, zero at first.

    Of a worker whose ranks are lanes it is one lane's: its pages' ids go from `first_page` on. Rank 0 has on the host
    what there is of the other lanes' as well, which only passes through: `num_host_pages`.

    Who may read or write which page is the page pool's business. The engine thread writes pages; `page_bytes` hands
    their bytes to the transfer. On a CPU that is the same memory. On a GPU a transfer works on a copy of the pool on
    the host: `copy_to_host` brings pages there before they are sent, `copy_from_host` takes pages that arrived. The
    copy takes real memory only for pages that were moved.

    Pages are copied on a CUDA stream of their own, behind what the steps' stream holds when a copy begins, or held when
    it was marked. On that stream itself a copy would wait, layer by layer, for whatever step was launched meanwhile.
    Copies take turns: they share two buffers of pinned memory (`page_ring`), and the link.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_pages: int,
        device: str = "cpu",
        *,
        has_host_copy: bool | None = None,
        allocate: Allocate | None = None,
        first_page: int = 0,
        num_host_pages: int = 0,
    ) -> None:
        """Allocate the pool; `has_host_copy` None: where the device is not the CPU.

        `allocate` makes the memory that `page_bytes` shows; None: torch does. `num_host_pages` 0: as many as pages.
        """
        self.layout = layout
        self.num_pages = num_pages
        self.first_page = first_page
        self._num_host_pages = num_host_pages or num_pages
        dtype = TORCH_DTYPES[layout.dtype.element]
        shape = (self._num_host_pages, *layout.page_shape)
        has_copy = has_host_copy if has_host_copy is not None else device != "cpu"
        if allocate is not None:
            buffers = allocate(layout.num_layers, shape[0] * layout.page_layer_bytes)
            self._host = [torch.frombuffer(buffer, dtype=dtype).view(shape) for buffer in buffers]
        else:
            new = torch.empty if has_copy else torch.zeros
            self._host = [new(shape, dtype=dtype) for _ in range(layout.num_layers)]
        self.layers: list[Tensor] = [layer[:num_pages] for layer in self._host]
        if has_copy:
            own = (num_pages, *layout.page_shape)
            self.layers = [torch.zeros(own, dtype=dtype, device=device) for _ in range(layout.num_layers)]
        self._stream = torch.cuda.Stream() if self.layers[0].is_cuda else None
        self._rows = [page_rows(layer) for layer in self._host]
        self._ring = PageRing(layout, dtype, self.layers[0].device) if has_copy else None
        self._turn = threading.Lock()

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """Return the bytes of one page of one layer on the host: writable, contiguous, no copy.

        Raises:
            IndexError: there is no such layer or page.
        """
        row = page_id - self.first_page
        if not 0 <= row < self._num_host_pages:
            raise IndexError(f"page {page_id} is outside a pool of {self._num_host_pages}")
        return self._rows[layer][row].data

    @property
    def page_ids(self) -> range:
        """The ids of its pages."""
        return range(self.first_page, self.first_page + self.num_pages)

    def host_layers(self) -> Sequence[memoryview]:
        """Return all that `page_bytes` shows, by layer: pages in the order of their ids."""
        return [layer.view(-1).view(torch.uint8).numpy().data for layer in self._host]

    def mark(self) -> Mark | None:
        """Return what a copy waits for that is to bring what was written so far, and no more. Engine thread only."""
        if self._stream is None:
            return None
        launched = torch.cuda.Event()
        launched.record()
        return launched

    def copy_to_host(self, page_ids: Sequence[int], layers: range | None = None, behind: Mark | None = None) -> None:
        """Let `page_bytes` show what the device's pages hold in `layers`, None: in all. Not on the event loop.

        Returns when it does. What they held at the mark `behind`, without waiting for what was launched since; None:
        what they hold now.
        """
        if self._ring and page_ids:
            with self._copying(behind):
                places = self._places(page_ids)
                self._ring.copy_to_host(_part(self.layers, layers), _part(self._rows, layers), places)

    def copy_from_host(self, page_ids: Sequence[int], layers: range | None = None) -> None:
        """Set the device's pages to what `page_bytes` shows; returns when they are. Not on the event loop."""
        if self._ring and page_ids:
            with self._copying():
                places = self._places(page_ids)
                self._ring.copy_to_device(_part(self.layers, layers), _part(self._rows, layers), places)

    @contextmanager
    def _copying(self, behind: Mark | None = None) -> Generator[None]:
        """Run what is launched inside behind a mark, or all launched so far; leave when it is done, by an error too.

        One thread at a time: what a copy leaves in the buffers of the ring is done with before the next begins.
        """
        with self._turn:
            if self._stream is None:
                yield
                return
            if isinstance(behind, torch.cuda.Event):
                self._stream.wait_event(behind)
            else:
                self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._stream.synchronize()

    def zero_pages(self, page_ids: Sequence[int]) -> None:
        """Set every byte of these pages to zero, in all layers; those that are other lanes' are theirs to set."""
        places = self._places([page_id for page_id in page_ids if page_id in self.page_ids])
        if not places:
            return
        index = to_device(torch.tensor(places), self.layers[0].device)
        for layer in self.layers:
            layer.index_fill_(0, index, 0)

    def _places(self, page_ids: Sequence[int]) -> list[int]:
        """Return where in the tensors pages are; raise IndexError if one is not there."""
        if any(page_id not in self.page_ids for page_id in page_ids):
            raise IndexError(f"of pages {list(page_ids)} not all are among {self.page_ids}")
        return [page_id - self.first_page for page_id in page_ids]


def _part(by_layer: list[T], layers: range | None) -> list[T]:
    return by_layer if layers is None else by_layer[layers.start : layers.stop]
