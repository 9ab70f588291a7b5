"""`headrace_kernels.rms_norm` compiled: `src/rms_norm.cpp`."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, FLOAT, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import rms_norm as reference

_RmsNorm = structure("_RmsNorm", x=ADDRESS, x_stride=INT, num_rows=INT, width=INT, weight=ADDRESS, eps=FLOAT, y=ADDRESS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `headrace_kernels.rms_norm.rms_norm`."""
    if not takes(x.dtype) or x.ndim != 2 or x.stride(1) != 1 or weight.stride(0) != 1:
        return reference.rms_norm(x, weight, eps)
    y = x.new_empty(*x.shape)
    arguments = _RmsNorm(x.data_ptr(), x.stride(0), *x.shape, weight.data_ptr(), eps, y.data_ptr())
    call("rms_norm", arguments, x.dtype)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `headrace_kernels.rms_norm.add_rms_norm`; plain torch adds."""
    total = x + residual
    return rms_norm(total, weight, eps), total
