"""`headrace_kernels.rope` compiled: `src/rope.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import rope as reference

_Rope = structure(
    "_Rope",
    x=ADDRESS,
    row_stride=INT,
    head_stride=INT,
    num_rows=INT,
    num_heads=INT,
    rope_dim=INT,
    cos=ADDRESS,
    sin=ADDRESS,
    is_interleaved=INT,
    y=ADDRESS,
)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """See `headrace_kernels.rope.rope`."""
    are_plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in (cos, sin))
    if not takes(x.dtype) or x.stride(2) != 1 or not are_plain:
        return reference.rope(x, cos, sin, is_interleaved=is_interleaved)
    y = x.new_empty(*x.shape)
    arguments = _Rope(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        *x.shape,
        cos.data_ptr(),
        sin.data_ptr(),
        is_interleaved,
        y.data_ptr(),
    )
    call("rope", arguments, x.dtype)
    return y
