"""Linear layers whose weight is packed once for the machine.

Shapes: T tokens, I inputs, O outputs. `y = x @ weight.T + bias`.
Bytes read: O * I * itemsize for few tokens (bound by memory bandwidth); FLOPs: 2 * T * O * I for many (bound
by compute).

On a CPU, bfloat16 weights are held in oneDNN's blocked order, which saves reordering them at every call; the packed
copy is the only one. Everything else is plain torch. `torch.nn.functional.linear` is the specification.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_FOR_ROWS = 64


class Linear:
    """A weight, packed, and how to apply it."""

    __slots__ = ("bias", "in_features", "is_packed", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, is_packed: bool = True) -> None:
        """Take `weight` [O, I] and `bias` [O]; the caller drops its own reference.

        With `is_packed` False the weight is shared as it is.
        """
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.is_packed = is_packed and _can_pack(weight)
        self.weight = _pack(weight) if self.is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, O] for `x` [T, I]; T at least 1; dtype of the weight."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
