"""Which memory of the host is pinned, and what memory holds that nobody has written to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_pinned: dict[int, StorageWeakRef] = {}


def pin(tensor: Tensor) -> Tensor:
    """Say that the memory of `tensor`, on the host, is pinned; return it."""
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = StorageWeakRef(storage)
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Say whether the memory of `tensor`, on the host, is pinned."""
    known = _pinned.get(tensor.untyped_storage().data_ptr())
    return known is not None and not known.expired()


def poison(tensor: Tensor) -> Tensor:
    """Fill `tensor` with NaN, or -1, or the largest number; return it."""
    if tensor.dtype.is_floating_point:
        # torch fills no float8; with all its bits set it is a NaN.
        (tensor.view(torch.uint8).fill_(0xFF) if tensor.dtype.itemsize == 1 else tensor.fill_(float("nan")))
    elif tensor.dtype != torch.bool:
        tensor.fill_(-1 if tensor.dtype.is_signed else torch.iinfo(tensor.dtype).max)
    return tensor
