"""Memory of what one recorded step works on: it stays where it is, and the next recording begins at its start."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNED = 64
_CHUNK_BYTES = 1 << 20


class Arena:
    """Chunks of memory that tensors are cut from, one behind another. Engine thread only.

    Recordings of one arena share its memory: what one leaves there is valid until another is replayed.
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._at, self._used = 0, 0

    def restart(self) -> None:
        """Begin at the start again."""
        self._at, self._used = 0, 0

    def like(self, tensor: Tensor) -> Tensor:
        """Return memory for values of the shape and dtype of `tensor`, contiguous; what it holds is anything."""
        size = tensor.numel() * tensor.itemsize
        if size == 0:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return self._take(size).view(tensor.dtype).view(tensor.shape)

    def _take(self, size: int) -> Tensor:
        rounded = -(-size // _ALIGNED) * _ALIGNED
        while self._at < len(self._chunks) and self._used + rounded > len(self._chunks[self._at]):
            self._at, self._used = self._at + 1, 0
        if self._at == len(self._chunks):
            self._chunks.append(torch.empty(max(rounded, _CHUNK_BYTES), dtype=torch.uint8))
        first = self._used
        self._used += rounded
        return self._chunks[self._at][first : first + size]
