"""Linear layers of a decode step, with what stands before or after them: the norm, or the residual.

Shapes: T tokens, I inputs (N hidden where they are normalised), O outputs.
Bytes read: O * I * itemsize, each weight once: bound by memory bandwidth up to some 200 tokens. FLOPs: 2 * T * O * I.
A norm or a sum of its own would be a launch of its own, about as long as the layer takes for small O * I.

Without a kernel of their own, as for many tokens on a GPU, both are made of `rms_norm` and a plain linear layer.
`norm_linear` and `linear_add` are the entries; `norm_linear_ref` and `linear_add_ref` are the specifications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.rms_norm import inverse_root


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None = None
) -> Tensor:
    """Return the root-mean-square norm of `x`, times `weight`, plus `bias`.

    The kernel multiplies `x * norm_weight`, rounded to the dtype of `x`, and scales the float32 sums at the end. The
    normalised value is never rounded, so the result differs from `rms_norm` and a linear layer by what that rounding
    did: less than one rounding of each input. How a row is summed depends on T only through the size of the tile.

    Args:
        x: [T, N] float32 or bfloat16, rows contiguous.
        norm_weight: [N], dtype of `x`; None: ones, for a factor that is already in `weight`.
        weight: [O, N], dtype of `x`, rows contiguous.
        eps: added to the mean square.
        bias: [O], dtype of `x`; None: none.

    Returns:
        [T, O], dtype of `x`.

    Raises:
        ValueError: the shapes, dtypes or strides do not fit.
    """
    _check(x, weight, bias)
    if norm_weight is not None and (norm_weight.shape != x.shape[1:] or norm_weight.dtype != x.dtype):
        raise ValueError(f"norm_weight {tuple(norm_weight.shape)} {norm_weight.dtype} does not fit x {tuple(x.shape)}")
    return select("decode_linear", x).norm_linear(x, norm_weight, weight, eps, bias)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `residual + x @ weight.T + bias`; the kernel adds in float32 and rounds once.

    Args:
        x: [T, I] float32 or bfloat16, rows contiguous.
        weight: [O, I], dtype of `x`, rows contiguous.
        residual: [T, O], dtype of `x`, rows contiguous.
        bias: [O], dtype of `x`; None: none.

    Returns:
        [T, O], dtype of `x`; `residual` is left as it is.

    Raises:
        ValueError: the shapes, dtypes or strides do not fit.
    """
    _check(x, weight, bias)
    if residual.shape != (len(x), len(weight)) or residual.dtype != x.dtype or residual.stride(1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} does not fit {(len(x), len(weight))}")
    return select("decode_linear", x).linear_add(x, weight, residual, bias)


def norm_linear_ref(
    x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float, bias: Tensor | None = None
) -> Tensor:
    """Specification of `norm_linear` in plain torch, in float32 throughout."""
    wide = x.float()
    scale = inverse_root(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = (wide if norm_weight is None else wide * norm_weight.float()) @ weight.float().T * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_add_ref(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """Specification of `linear_add` in plain torch, in float32 throughout."""
    out = x.float() @ weight.float().T + residual.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype:
        raise ValueError(f"x {x.dtype} and weight {weight.dtype} must both be float32 or both bfloat16")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if (x.shape[1] > 1 and x.stride(1) != 1) or (weight.shape[1] > 1 and weight.stride(1) != 1):
        raise ValueError("the rows of x and weight must be contiguous")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)}")
