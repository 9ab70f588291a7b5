"""`headrace_kernels.silu_mul` compiled: `src/silu_mul.cpp`; rounded once."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.cpu.arguments import ADDRESS, INT, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.reference import silu_mul as reference

_SiluMul = structure("_SiluMul", gate_up=ADDRESS, stride=INT, num_rows=INT, width=INT, y=ADDRESS)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `headrace_kernels.silu_mul.silu_mul`."""
    if not takes(gate_up.dtype) or gate_up.ndim != 2 or gate_up.stride(1) != 1:
        return reference.silu_mul(gate_up)
    width = gate_up.shape[1] // 2
    y = gate_up.new_empty(len(gate_up), width)
    call("silu_mul", _SiluMul(gate_up.data_ptr(), gate_up.stride(0), len(gate_up), width, y.data_ptr()), gate_up.dtype)
    return y
