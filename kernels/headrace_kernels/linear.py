"""Linear layers whose weight is packed once for the machine.

Shapes: T tokens, I inputs, O outputs. `y = x @ weight.T + bias`.
Bytes read: O * I * itemsize for few tokens (bound by memory bandwidth); FLOPs: 2 * T * O * I for many (bound by
compute).

On a CPU, bfloat16 weights are held in oneDNN's blocked order, which saves reordering them at every call; the packed
copy is the only one. oneDNN compiles a program for each new shape: measured, 1.6 ms and 0.6 MiB each. So the number of
rows is padded to one of few, and the programs kept are bounded. `torch.nn.functional.linear` is the specification.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.backend import backend

_PACKED_FOR_ROWS = 64
_EXACT_ROWS = 8
_STEPS_PER_OCTAVE = 4
# Read by oneDNN when it compiles its first program; 1024, its default, would come to 600 MiB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class Linear:
    """A weight, packed, and how to apply it."""

    __slots__ = ("bias", "in_features", "is_packed", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, is_packed: bool = True) -> None:
        """Take `weight` [O, I] and `bias` [O]; the caller drops its own reference.

        With `is_packed` False the weight is shared as it is.
        """
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.is_packed = is_packed and _is_onednn(weight)
        self.weight = _pack(weight) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, O] for `x` [T, I]; T at least 1; dtype of the weight."""
        if not self.is_packed:
            return linear(x, self.weight, self.bias)
        num_rows = len(x)
        padded = pad_rows(x)
        out = torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")
        return out if len(out) == num_rows else out[:num_rows]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return [T, O] for `x` [T, I] and a plain `weight` [O, I]."""
    if not _is_onednn(weight):
        return F.linear(x, weight, bias)
    return F.linear(pad_rows(x), weight, bias)[: len(x)]


def pad_rows(x: Tensor) -> Tensor:
    """Return `x` [T, I] with rows of zeros up to `padded_count(T)`."""
    missing = padded_count(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def padded_count(count: int) -> int:
    """Return the least number not below `count` that is at most 8 or one of 4 steps between powers of two."""
    if count <= _EXACT_ROWS:
        return count
    step = (1 << ((count - 1).bit_length() - 1)) // _STEPS_PER_OCTAVE
    return -(-count // step) * step


def _is_onednn(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and backend(weight) == "reference"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
