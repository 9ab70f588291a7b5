"""`headrace_kernels.linear` over weights in blocks of FP8 (`block_fp8`), compiled: `src/linear.cpp`, `src/fp8.h`.

A panel's bytes become floats where they are multiplied: for few rows in registers, for many 128 terms at a time. What
comes out is what the specification's dequantised weights give, in float32, rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.cpu import panels
from headrace_kernels.cpu.library import takes
from headrace_kernels.cpu.linear import run
from headrace_kernels.cpu.panels import PanelScales
from headrace_kernels.reference import fp8_linear as reference


class PackedFp8(NamedTuple):
    """The bytes, uint8, in panels, and the scales of those."""

    values: Tensor
    scales: PanelScales


# What computes other dtypes than the compiled kernels' is the specification, over a weight that is not packed.


def pack(weight: BlockFp8, dtype: torch.dtype) -> PackedFp8 | None:
    """See `headrace_kernels.linear.Linear`."""
    if not takes(dtype):
        return None
    return PackedFp8(panels.pack(weight.values.view(torch.uint8)), panel_scales(weight))


def panel_scales(weight: BlockFp8) -> PanelScales:
    """Return a row of scales for every panel: one for a group of terms where a panel lies in one block, else 16."""
    num_outputs, (rows, columns) = weight.shape[0], weight.block
    lanes = num_lanes(num_outputs, rows)
    first = torch.arange(0, panels.padded(num_outputs), panels.LANES // lanes).clamp_(max=max(num_outputs - 1, 0))
    scales = weight.scales[first // rows].unflatten(0, (-1, lanes)).transpose(1, 2).contiguous()
    return PanelScales(scales, columns)


def num_lanes(num_outputs: int, rows: int) -> int:
    """Return how many scales a panel has for a group of terms, where blocks have `rows`."""
    return 1 if rows % panels.LANES == 0 or rows >= num_outputs else panels.LANES


def packed_linear(x: Tensor, packed: PackedFp8 | BlockFp8, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`."""
    if isinstance(packed, BlockFp8):
        return reference.packed_linear(x, packed, bias, num_outputs)
    return run(x, packed.values, bias, num_outputs, scales=packed.scales)


def packed_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    packed: PackedFp8 | BlockFp8,
    eps: float,
    bias: Tensor | None,
    num_outputs: int,
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`; what the norm gives is not rounded."""
    if isinstance(packed, BlockFp8):
        return reference.packed_norm_linear(x, norm_weight, packed, eps, bias, num_outputs)
    return run(x, packed.values, bias, num_outputs, norm=(norm_weight, eps), scales=packed.scales)


def packed_linear_add(x: Tensor, packed: PackedFp8 | BlockFp8, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`; rounded once."""
    if isinstance(packed, BlockFp8):
        return reference.packed_linear_add(x, packed, residual, bias)
    return run(x, packed.values, bias, residual.shape[1], residual=residual, scales=packed.scales)
