"""The tensors that hold pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_core.kv.layout import CacheDtype, KvLayout

TORCH_DTYPES = {
    CacheDtype.FLOAT32: torch.float32,
    CacheDtype.BFLOAT16: torch.bfloat16,
    CacheDtype.FLOAT16: torch.float16,
}


class KvCache:
    """Memory of a pool of pages: one tensor [num_pages, *page_shape] per layer, zero at first.

    Who may read or write which page is the page pool's business. The engine thread writes pages; `page_bytes` hands the
    same memory to the transfer.
    """

    def __init__(self, layout: KvLayout, num_pages: int, device: str = "cpu") -> None:
        self.layout = layout
        self.num_pages = num_pages
        dtype = TORCH_DTYPES[layout.dtype]
        self.layers: list[Tensor] = [
            torch.zeros((num_pages, *layout.page_shape), dtype=dtype, device=device) for _ in range(layout.num_layers)
        ]
        self._bytes: list[memoryview] = []
        if device == "cpu":
            self._bytes = [layer.view(-1).view(torch.uint8).numpy().data for layer in self.layers]

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """Return the bytes of one page of one layer: writable, contiguous, the cache's own memory. CPU only.

        Raises:
            IndexError: there is no such layer or page.
        """
        if not 0 <= page_id < self.num_pages:
            raise IndexError(f"page {page_id} is outside a pool of {self.num_pages}")
        size = self.layout.page_layer_bytes
        return self._bytes[layer][page_id * size : (page_id + 1) * size]

    def zero_pages(self, page_ids: Sequence[int]) -> None:
        """Set every byte of these pages to zero, in all layers."""
        if not page_ids:
            return
        index = torch.tensor(list(page_ids), dtype=torch.int64, device=self.layers[0].device)
        for layer in self.layers:
            layer.index_fill_(0, index, 0)
