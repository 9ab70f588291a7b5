"""How tensors are handed to the compiled kernels: structures of their addresses, strides and sizes."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

ADDRESS = ctypes.c_void_p
INT = ctypes.c_int64
FLOAT = ctypes.c_float


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """Return a structure of these fields, in the order of the one in the kernel's source."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def check(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor that a kernel would read beyond: it sees addresses alone.

    Raises:
        ValueError: `tensor` is not of `shape` and `dtype` with contiguous rows.
    """
    if tensor.shape != shape or tensor.dtype != dtype or not (tensor.is_contiguous() or tensor.stride(-1) == 1):
        raise ValueError(f"{what} {tuple(tensor.shape)} {tensor.dtype} does not fit {shape} {dtype}, rows contiguous")


def address(tensor: Tensor | None) -> int | None:
    """Return where `tensor` lies; None stays None."""
    return None if tensor is None else tensor.data_ptr()
