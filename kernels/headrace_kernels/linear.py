"""Linear layers whose weight is packed once for the machine.

Shapes: T tokens, I inputs, O outputs. `y = x @ weight.T + bias`.
Bytes read: O * I * itemsize for few tokens (bound by memory bandwidth); FLOPs: 2 * T * O * I for many (bound by
compute).

`Linear` holds a weight in the order that suits its backend, and that copy alone; `linear` takes one as it is.
`torch.nn.functional.linear` is the specification. A weight in blocks of FP8 (`block_fp8`) stays so: it is brought to
floats where it is multiplied. On a GPU activations of many tokens are quantised as well; else they are not.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.dispatch import select

# Read by oneDNN when it compiles its first program, for whatever family: so set here, not where its layers are. The
# programs kept are bounded; 1024, its default, would come to 600 MiB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class Linear:
    """A weight, packed, and how to apply it."""

    __slots__ = ("_kernels", "bias", "in_features", "is_fp8", "is_packed", "out_features", "weight")

    def __init__(
        self,
        weight: Tensor | BlockFp8,
        bias: Tensor | None = None,
        *,
        is_packed: bool = True,
        is_int8: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take `weight` [O, I] and `bias` [O]; the caller drops its own reference.

        With `is_packed` False the weight is shared as it is, and so it is where the backend packs none. With `is_int8`
        it is held, and multiplied, in 8 bits (`int8_weights`). `dtype` is that of activations, None: the weight's; a
        weight in blocks of FP8 needs it.

        Raises:
            ValueError: `bias` does not fit `weight`.
        """
        # What packed a weight is what can read it, whatever backend is in force later; what is not packed any can.
        self.is_fp8 = isinstance(weight, BlockFp8)
        if isinstance(weight, BlockFp8):
            assert dtype is not None, "FP8 is no type of activations"
            self._kernels = select("fp8_linear", weight.values)
            packed = self._kernels.pack(weight, dtype) if is_packed else None
        else:
            dtype = weight.dtype
            self._kernels = select("int8_linear", weight) if is_int8 else select("linear", weight)
            packed = self._kernels.pack(weight) if is_packed else None
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype or bias.stride(0) != 1):
            raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)} {dtype}")
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.is_packed = packed is not None
        self.weight: Any = weight if packed is None else packed

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, O] for `x` [T, I]; T at least 1; dtype of the weight."""
        if self.is_packed:
            return self._kernels.packed_linear(x, self.weight, self.bias, self.out_features)
        if self.is_fp8:
            return select("fp8_linear", x).packed_linear(x, self.weight, self.bias, self.out_features)
        return linear(x, self.weight, self.bias)

    def after_norm(self, x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
        """Return this layer of the root-mean-square norm of `x` [T, I]: see `decode_linear.norm_linear`."""
        if self.is_packed:
            return self._kernels.packed_norm_linear(x, norm_weight, self.weight, eps, self.bias, self.out_features)
        if self.is_fp8:
            kernels = select("fp8_linear", x)
            return kernels.packed_norm_linear(x, norm_weight, self.weight, eps, self.bias, self.out_features)
        return norm_linear(x, norm_weight, self.weight, eps, self.bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return `residual` [T, O] and this layer of `x` [T, I]: see `decode_linear.linear_add`."""
        if residual.shape[1] != self.out_features:
            raise ValueError(f"residual {tuple(residual.shape)} does not fit {self.out_features} outputs")
        if self.is_packed:
            return self._kernels.packed_linear_add(x, self.weight, residual, self.bias)
        if self.is_fp8:
            return select("fp8_linear", x).packed_linear_add(x, self.weight, residual, self.bias)
        return linear_add(x, self.weight, residual, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return [T, O] for `x` [T, I] and a plain `weight` [O, I]."""
    return select("linear", weight).linear(x, weight, bias)
