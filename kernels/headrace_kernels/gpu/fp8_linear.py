"""`headrace_kernels.linear` over weights in blocks of FP8 (`block_fp8`) on a GPU; they are kept as they are stored.

Up to `decode_linear.MAX_ROWS` rows, where reading weights is what takes time, the weights become activations' type
where they are multiplied, and activations stay as they are (`gpu/decode_linear`). More rows are quantised in groups of
128 (`act_quant`) and multiplied in FP8 by the experts' kernel (`gpu/grouped_gemm`), as those of one expert. Blocks that
these don't take, of a weight that was cut within one of its blocks, are multiplied by plain torch.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headrace_kernels.act_quant import act_quant
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import GROUP
from headrace_kernels.gpu import decode_linear, grouped_gemm
from headrace_kernels.reference import fp8_linear as reference
from headrace_kernels.rms_norm import rms_norm

_BLOCK_SIZE = 128
_LEAST_COLUMNS = 16


def pack(weight: BlockFp8, dtype: torch.dtype) -> None:
    """See `headrace_kernels.linear.Linear`: nothing is packed."""


def packed_linear(x: Tensor, packed: BlockFp8, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`."""
    if _are_few(x, packed):
        return _few(x, packed, bias)
    if not _is_multiplied_in_fp8(x, packed):
        return reference.packed_linear(x, packed, bias, num_outputs)
    out = _many(x, packed)
    return out if bias is None else out.add_(bias)


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor | None, packed: BlockFp8, eps: float, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`; of many rows what the norm gives is rounded."""
    if _are_few(x, packed):
        return _few(x, packed, bias, norm=(norm_weight, eps))
    norm_weight = x.new_ones(x.shape[1]) if norm_weight is None else norm_weight
    return packed_linear(rms_norm(x, norm_weight, eps), packed, bias, num_outputs)


def packed_linear_add(x: Tensor, packed: BlockFp8, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`."""
    if _are_few(x, packed):
        return _few(x, packed, bias, residual=residual)
    return packed_linear(x, packed, bias, residual.shape[1]).add_(residual)


def _are_few(x: Tensor, weight: BlockFp8) -> bool:
    columns = weight.block[1]
    return len(x) <= decode_linear.MAX_ROWS and (columns % _LEAST_COLUMNS == 0 or columns >= x.shape[1])


def _few(
    x: Tensor,
    weight: BlockFp8,
    bias: Tensor | None,
    *,
    norm: tuple[Tensor | None, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    norm_weight, eps = norm or (None, 0.0)
    return decode_linear.run(
        x,
        weight.values,
        bias,
        norm_weight,
        residual,
        eps,
        is_normalised=norm is not None,
        scales=weight.scales,
        block=weight.block,
    )


def _is_multiplied_in_fp8(x: Tensor, weight: BlockFp8) -> bool:
    return x.dtype == torch.bfloat16 and weight.block == (GROUP, GROUP)


def _many(x: Tensor, weight: BlockFp8) -> Tensor:
    values, scales = act_quant(x)
    num_blocks = -(-len(x) // _BLOCK_SIZE)
    blocks = DeviceBlocks(
        *_one_expert(num_blocks, x.device), counts=x.new_empty(0), block_size=_BLOCK_SIZE, num_assignments=len(x)
    )
    return grouped_gemm.experts_down(values, weight.values[None], blocks, weight.scales[None], scales)


@cache
def _one_expert(num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `DeviceBlocks` has of rows that are all one expert's: which each is, its blocks, how many."""
    return (
        torch.arange(num_blocks * _BLOCK_SIZE, dtype=torch.int32, device=device),
        torch.zeros(num_blocks, dtype=torch.int32, device=device),
        torch.full((1,), num_blocks, dtype=torch.int32, device=device),
    )
