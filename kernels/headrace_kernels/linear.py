"""Linear layers whose weight is packed once for the machine.

Shapes: T tokens, I inputs, O outputs. `y = x @ weight.T + bias`.
Bytes read: O * I * itemsize for few tokens (bound by memory bandwidth); FLOPs: 2 * T * O * I for many (bound by
compute).

`Linear` holds a weight in the order that suits its backend, and that copy alone; `linear` takes one as it is.
`torch.nn.functional.linear` is the specification.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.dispatch import select

# Read by oneDNN when it compiles its first program, for whatever family: so set here, not where its layers are. The
# programs kept are bounded; 1024, its default, would come to 600 MiB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class Linear:
    """A weight, packed, and how to apply it."""

    __slots__ = ("_kernels", "bias", "in_features", "is_packed", "out_features", "weight")

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, is_packed: bool = True, is_int8: bool = False
    ) -> None:
        """Take `weight` [O, I] and `bias` [O]; the caller drops its own reference.

        With `is_packed` False the weight is shared as it is, and so it is where the backend packs none. With `is_int8`
        it is held, and multiplied, in 8 bits (`int8_weights`).

        Raises:
            ValueError: `bias` does not fit `weight`.
        """
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.stride(0) != 1):
            raise ValueError(
                f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}"
            )
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # What packed a weight is what can read it, whatever backend is in force later.
        self._kernels = select("int8_linear", weight) if is_int8 else select("linear", weight)
        packed = self._kernels.pack(weight) if is_packed else None
        self.is_packed = packed is not None
        self.weight: Any = weight if packed is None else packed

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, O] for `x` [T, I]; T at least 1; dtype of the weight."""
        if not self.is_packed:
            return linear(x, self.weight, self.bias)
        return self._kernels.packed_linear(x, self.weight, self.bias, self.out_features)

    def after_norm(self, x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
        """Return this layer of the root-mean-square norm of `x` [T, I]: see `decode_linear.norm_linear`."""
        if not self.is_packed:
            return norm_linear(x, norm_weight, self.weight, eps, self.bias)
        return self._kernels.packed_norm_linear(x, norm_weight, self.weight, eps, self.bias, self.out_features)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return `residual` [T, O] and this layer of `x` [T, I]: see `decode_linear.linear_add`."""
        if residual.shape[1] != self.out_features:
            raise ValueError(f"residual {tuple(residual.shape)} does not fit {self.out_features} outputs")
        if not self.is_packed:
            return linear_add(x, self.weight, residual, self.bias)
        return self._kernels.packed_linear_add(x, self.weight, residual, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return [T, O] for `x` [T, I] and a plain `weight` [O, I]."""
    return select("linear", weight).linear(x, weight, bias)
