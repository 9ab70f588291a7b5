"""`headrace_kernels.rms_norm` in Triton: one program a row, the row held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.launch import launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `headrace_kernels.rms_norm.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, width = x.shape
    block, num_warps = triton.next_power_of_2(width), _num_warps(width)
    launch(_rms_norm_kernel, (num_rows,), x, x.stride(0), weight, out, width, eps, BLOCK_N=block, num_warps=num_warps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `headrace_kernels.rms_norm.add_rms_norm`."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    num_rows, width = x.shape
    block, num_warps = triton.next_power_of_2(width), _num_warps(width)
    inputs = (x, x.stride(0), residual, residual.stride(0), weight)
    launch(_add_rms_norm_kernel, (num_rows,), *inputs, out, total, width, eps, BLOCK_N=block, num_warps=num_warps)
    return out, total


def _num_warps(width: int) -> int:
    """One warp for up to 512 columns, 16 a thread; more for wider rows, up to 8."""
    return 1 if width <= 512 else 2 if width <= 1024 else 4 if width <= 2048 else 8


@triton.jit
def inverse_root(mean_square, eps) -> tl.tensor:
    """Return 1 / sqrt(mean_square + eps), and NaN for infinity."""
    return tl.where(mean_square < float("inf"), tl.rsqrt(mean_square + eps), float("nan"))


@triton.jit
def normalise(x, mean_square, weight, eps, DTYPE: tl.constexpr) -> tl.tensor:
    """Return float32 `x` normalised and scaled, as values of DTYPE."""
    # Rounded before the weight is applied, as the specification does.
    normalised = (x * inverse_root(mean_square, eps)).to(DTYPE).to(tl.float32)
    return (normalised * weight).to(DTYPE)


@triton.jit
def _rms_norm_kernel(x_ptr, x_stride, weight_ptr, out_ptr, width, eps, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    is_inside = n < width
    x = tl.load(x_ptr + row * x_stride + n, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + n, mask=is_inside, other=0.0).to(tl.float32)
    out = normalise(x, tl.sum(x * x, axis=0) / width, weight, eps, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + n, out, mask=is_inside)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, weight_ptr, out_ptr, total_ptr, width, eps, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    is_inside = n < width
    x = tl.load(x_ptr + row * x_stride + n, mask=is_inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + n, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + n, mask=is_inside, other=0.0).to(tl.float32)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * width + n, total, mask=is_inside)
    x = total.to(tl.float32)
    out = normalise(x, tl.sum(x * x, axis=0) / width, weight, eps, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + n, out, mask=is_inside)
