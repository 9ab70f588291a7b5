"""Pages between a device and ordinary memory of the host, through two buffers in turn.

A GPU copies from and to pinned memory alone at full speed and beside the host. Pinned memory can't be swapped and is
taken from everybody, so its amount is bounded: two buffers of `BUFFER_BYTES`, or of one page of one layer where that is
larger. While the device copies one, the host empties or fills the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from headrace_kernels.page_copy import gather_pages, scatter_pages
from torch import Tensor

from headrace_core.kv.layout import KvLayout
from headrace_core.model.host_copies import HostBuffer, to_device

BUFFER_BYTES = 8 << 20
"""Some 150 microseconds of a PCIe 5 link, beside which launching a copy is little."""


class PageRing:
    """For pages of `layout` and `dtype` on `device`. One copy, of one thread, at a time."""

    def __init__(self, layout: KvLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._capacity = max(1, BUFFER_BYTES // layout.page_layer_bytes)
        shape = (self._capacity, *layout.page_shape)
        buffers = [HostBuffer(shape, dtype, device) for _ in range(2)]
        self._buffers = [(buffer, page_rows(buffer.values)) for buffer in buffers]

    def copy_to_host(self, layers: Sequence[Tensor], host: Sequence[np.ndarray], page_ids: Sequence[int]) -> None:
        """Set the pages' rows of `host`, `page_rows` by layer, to what `layers` [P, *page_shape] hold.

        They hold it behind what was launched so far. Returns when it is done.
        """
        parts = self._parts(layers, host, page_ids)
        for number, part in enumerate(parts):
            buffer, _ = self._buffers[number % 2]
            buffer.receive(gather_pages(part.layer, part.ids))
            if number:
                self._empty(number - 1, parts[number - 1])
        self._empty(len(parts) - 1, parts[-1])

    def copy_to_device(self, layers: Sequence[Tensor], host: Sequence[np.ndarray], page_ids: Sequence[int]) -> None:
        """Set the pages of `layers` to their rows of `host`; see `copy_to_host`.

        Returns when the last is on its way: pages are set before what is launched next.
        """
        for number, part in enumerate(self._parts(layers, host, page_ids)):
            buffer, rows = self._buffers[number % 2]
            buffer.wait()
            # "clip": to refuse ids outside the pool, which come from the pool, numpy would copy twice.
            np.take(part.host, part.rows, axis=0, out=rows[: len(part.rows)], mode="clip")
            scatter_pages(buffer.send(len(part.rows), self._device), part.layer, part.ids)

    def _parts(self, layers: Sequence[Tensor], host: Sequence[np.ndarray], page_ids: Sequence[int]) -> list[_Part]:
        """Return what fits a buffer at a time; at least one."""
        every = np.array(page_ids, dtype=np.int64)
        some = [every[first : first + self._capacity] for first in range(0, len(every), self._capacity)]
        batches = [(rows, to_device(torch.from_numpy(rows), self._device)) for rows in some]
        pools = zip(layers, host, strict=True)
        return [_Part(layer, pages, rows, ids) for layer, pages in pools for rows, ids in batches]

    def _empty(self, number: int, part: _Part) -> None:
        """Take the pages that part `number` brings out of its buffer, as soon as they are there."""
        buffer, rows = self._buffers[number % 2]
        buffer.wait()
        part.host[part.rows] = rows[: len(part.rows)]


@dataclass(frozen=True, slots=True)
class _Part:
    """Pages of one layer: the layer's on the device and on the host, and which, as rows there and as ids here."""

    layer: Tensor
    host: np.ndarray
    rows: np.ndarray
    ids: Tensor


def page_rows(pages: Tensor) -> np.ndarray:
    """Return the bytes of pages [P, *page_shape] on the host as rows, [P, bytes of a page], the same memory."""
    return pages.flatten(1).view(torch.uint8).numpy()
