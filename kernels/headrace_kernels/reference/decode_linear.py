"""`headrace_kernels.decode_linear` in plain torch: made of `rms_norm` and a plain linear layer."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.linear import linear
from headrace_kernels.rms_norm import rms_norm


def norm_linear(x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.decode_linear.norm_linear`."""
    return linear(rms_norm(x, x.new_ones(x.shape[1]) if norm_weight is None else norm_weight, eps), weight, bias)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.decode_linear.linear_add`."""
    return residual + linear(x, weight, bias)
