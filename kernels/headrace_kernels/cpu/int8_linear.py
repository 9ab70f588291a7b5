"""`headrace_kernels.linear` over weights in 8 bits (`int8_weights`), compiled; `src/linear.cpp`, `src/bytes.h`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.cpu import panels
from headrace_kernels.cpu.library import takes
from headrace_kernels.cpu.linear import run
from headrace_kernels.cpu.panels import PanelScales
from headrace_kernels.int8_weights import Int8Weight
from headrace_kernels.reference import int8_linear as reference

# What computes other dtypes than the compiled kernels' is the specification, whose values are not in panels.


def pack(weight: Tensor) -> Int8Weight:
    """See `headrace_kernels.linear.Linear`; values in panels, and a scale for every output of those."""
    values, scales = reference.pack(weight)
    if not takes(weight.dtype):
        return Int8Weight(values, scales)
    return Int8Weight(panels.pack(values), F.pad(scales, (0, -len(scales) % panels.LANES)))


def packed_linear(x: Tensor, packed: Int8Weight, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`."""
    if not takes(x.dtype):
        return reference.packed_linear(x, packed, bias, num_outputs)
    return run(x, packed.values, bias, num_outputs, scales=_of_outputs(packed, x))


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor | None, packed: Int8Weight, eps: float, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`; what the norm gives is not rounded before it is quantised."""
    if not takes(x.dtype):
        return reference.packed_norm_linear(x, norm_weight, packed, eps, bias, num_outputs)
    return run(x, packed.values, bias, num_outputs, norm=(norm_weight, eps), scales=_of_outputs(packed, x))


def packed_linear_add(x: Tensor, packed: Int8Weight, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`; rounded once."""
    if not takes(x.dtype):
        return reference.packed_linear_add(x, packed, residual, bias)
    return run(x, packed.values, bias, residual.shape[1], residual=residual, scales=_of_outputs(packed, x))


def _of_outputs(packed: Int8Weight, x: Tensor) -> PanelScales:
    return PanelScales(packed.scales.view(-1, 1, panels.LANES), x.shape[1])
