"""Quantise activations to fp8 in groups: the left operand of a block-scaled product.

Shapes: T rows, N columns. Each group of 128 columns of a row has one scale, the one that brings its largest value to
448, the end of float8_e4m3fn; a group that is not finite throughout has one that is not. Bytes moved:
T * N * (itemsize + 1), so the kernel is bound by memory bandwidth.

`act_quant` is the entry, `act_quant_ref` the specification; `dequantise` undoes it, and undoes the scales of weights.
Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2: 1 x 128 tiles of activations, 128 x 128 blocks of weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8, FP8_MAX, GROUP, SMALLEST_MAXIMUM, num_groups


def act_quant(x: Tensor, blocks: DeviceBlocks | None = None) -> tuple[Tensor, Tensor]:
    """Return `x` as fp8, and the scales that undo it.

    Args:
        x: [T, N], any float dtype; its rows may lie apart.
        blocks: what the rows are, when they are those of expert blocks: rows of padding are neither read nor written.

    Returns:
        values [T, N] float8_e4m3fn and scales [T, ceil(N / 128)] float32, `value * scale` being near `x`.

    Raises:
        ValueError: `x` is no matrix with contiguous rows, or the blocks do not cover its rows.
    """
    if x.ndim != 2 or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} with strides {x.stride()} must be [T, N] with contiguous rows")
    if blocks is not None and len(blocks.assignment) != len(x):
        raise ValueError(f"x has {len(x)} rows but the blocks {len(blocks.assignment)}")
    return select("act_quant", x).act_quant(x, blocks)


def act_quant_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """Specification of `act_quant` in plain torch."""
    width = x.shape[1]
    groups = F.pad(x.float(), (0, num_groups(width) * GROUP - width)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(dim=2, keepdim=True).clamp_min(SMALLEST_MAXIMUM)
    # Between a tensor and a number torch would multiply by a reciprocal, which rounds twice: a number divided by a
    # tensor anywhere, a tensor divided by a number on a GPU.
    fp8_max = torch.full_like(largest, FP8_MAX)
    values = (groups * (fp8_max / largest)).to(FP8)
    return values.flatten(1)[:, :width].contiguous(), (largest / fp8_max).squeeze(2)


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """Return `values` [..., O, I] times their `scales`, in float32.

    `scales` are [..., ceil(O / 128), ceil(I / 128)] for weights and [O, ceil(I / 128)] for activations: whichever their
    number of rows says.
    """
    rows, width = values.shape[-2:]
    if scales.shape[-2] != rows:
        scales = scales.repeat_interleave(GROUP, dim=-2)[..., :rows, :]
    return values.float() * scales.repeat_interleave(GROUP, dim=-1)[..., :width]
