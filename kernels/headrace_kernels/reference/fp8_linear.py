"""`headrace_kernels.linear` over weights in blocks of FP8 (`block_fp8`), in plain torch: the specification, and slow.

Some outputs at a time, whose weights are brought to float32 for the product; activations are not quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.rms_norm import rms_norm

_TILE_VALUES = 1 << 22
"""Weights that are brought to float32 at once, about."""


def pack(weight: BlockFp8, dtype: torch.dtype) -> None:
    """See `headrace_kernels.linear.Linear`: nothing is packed."""


def packed_linear(x: Tensor, packed: BlockFp8, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`; rounded once."""
    return _product(x.float(), packed, bias).to(x.dtype)


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor | None, packed: BlockFp8, eps: float, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`; what the norm gives is not rounded."""
    wide = x.float()
    norm_weight = wide.new_ones(x.shape[1]) if norm_weight is None else norm_weight.float()
    return _product(rms_norm(wide, norm_weight, eps), packed, bias).to(x.dtype)


def packed_linear_add(x: Tensor, packed: BlockFp8, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`; rounded once."""
    return (_product(x.float(), packed, bias) + residual.float()).to(x.dtype)


def _product(x: Tensor, weight: BlockFp8, bias: Tensor | None) -> Tensor:
    """Return [T, O] float32."""
    rows, columns = weight.block
    blocks_at_once = max(1, _TILE_VALUES // max(1, rows * weight.shape[1]))
    parts: list[Tensor] = []
    for index in range(0, len(weight.scales), blocks_at_once):
        scales = weight.scales[index : index + blocks_at_once]
        values = weight.values[index * rows : (index + len(scales)) * rows].float()
        per_row = scales.repeat_interleave(rows, 0)[: len(values)]
        parts.append(x @ (values * per_row.repeat_interleave(columns, 1)[:, : values.shape[1]]).T)
    product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return product if bias is None else product + bias.float()
