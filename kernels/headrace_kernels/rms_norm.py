"""Root-mean-square normalisation of rows, alone or after a residual has been added.

Shapes: T tokens, N hidden. `y = (x / sqrt(mean(x^2) + eps)) * weight`, the mean in float32. A row whose mean is not
finite is NaN throughout: dividing by infinity would turn numbers too large to be squared into zeros.
Bytes moved: 2 * T * N * itemsize by `rms_norm`, 4 * T * N * itemsize by `add_rms_norm`, so both are bound by memory
bandwidth.

`rms_norm` and `add_rms_norm` are the entries; `rms_norm_ref` and `add_rms_norm_ref` are the specifications they are
tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x` normalised over its last axis and scaled by `weight`.

    Args:
        x: [T, N], any float dtype; rows contiguous.
        weight: [N], dtype of `x`; contiguous.
        eps: added to the mean square.

    Returns:
        [T, N], dtype of `x`, contiguous.

    Raises:
        ValueError: the widths or dtypes differ.
    """
    _check(x, weight)
    return select("rms_norm", x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + residual` normalised, and `x + residual` itself: what a layer computes on and what it adds to.

    Args:
        x: [T, N], any float dtype; rows contiguous.
        residual: [T, N], dtype of `x`; rows contiguous.
        weight: [N], dtype of `x`; contiguous.
        eps: added to the mean square.

    Returns:
        Two tensors [T, N], dtype of `x`, contiguous. The sum is rounded to that dtype before it is normalised.

    Raises:
        ValueError: the shapes or dtypes differ.
    """
    _check(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} is added to {tuple(residual.shape)} {residual.dtype}")
    return select("rms_norm", x).add_rms_norm(x, residual, weight, eps)


def inverse_root(x: Tensor) -> Tensor:
    """Return 1 / sqrt(x), float32, and NaN for infinity."""
    # 0 times a finite number is 0; times infinity it is NaN.
    return x.rsqrt().sub_(x, alpha=0.0)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Specification of `rms_norm` in plain torch: rounds to the dtype of `x` before the weight is applied.

    Source: huggingface/transformers models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3RMSNorm.
    """
    wide = x.to(torch.float32)
    mean_square = wide.pow(2).mean(-1, keepdim=True)
    scale = torch.rsqrt(mean_square + eps).masked_fill(mean_square.isinf(), float("nan"))
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Specification of `add_rms_norm` in plain torch."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def _check(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1:] != weight.shape or x.dtype != weight.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not fit")
