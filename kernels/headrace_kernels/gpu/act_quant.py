"""`headrace_kernels.act_quant` in Triton: one program for up to eight groups of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8, FP8_MAX, GROUP, SMALLEST_MAXIMUM, num_groups
from headrace_kernels.gpu.fp8 import quantise
from headrace_kernels.gpu.launch import is_interpreted, launch

_GROUPS_PER_PROGRAM = 8


def act_quant(x: Tensor, blocks: DeviceBlocks | None) -> tuple[Tensor, Tensor]:
    """See `headrace_kernels.act_quant.act_quant`."""
    num_rows, width = x.shape
    groups = num_groups(width)
    values = torch.empty((num_rows, width), dtype=FP8, device=x.device)
    scales = torch.empty((num_rows, groups), dtype=torch.float32, device=x.device)
    grid = (num_rows, triton.cdiv(groups, _GROUPS_PER_PROGRAM))
    rows = (blocks.assignment, blocks.num_assignments) if blocks is not None else (None, 0)
    launch(
        _act_quant_kernel,
        grid,
        *(x, x.stride(0), values, scales, *rows, width, groups),
        GROUP=GROUP,
        NUM_GROUPS=_GROUPS_PER_PROGRAM,
        SMALLEST_MAXIMUM=SMALLEST_MAXIMUM,
        FP8_MAX=FP8_MAX,
        IS_INTERPRETED=is_interpreted(),
    )
    return values, scales


@triton.jit(do_not_specialize=["num_assignments"])
def _act_quant_kernel(
    x_ptr,
    x_stride,
    values_ptr,
    scales_ptr,
    assignment_ptr,
    num_assignments,
    width,
    num_groups,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
    FP8_MAX: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if assignment_ptr is not None:
        is_padding = tl.load(assignment_ptr + row) >= num_assignments
        if is_padding:
            return
    group = tl.program_id(1) * NUM_GROUPS + tl.arange(0, NUM_GROUPS)
    n = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_inside = n < width
    x = tl.load(x_ptr + row * x_stride + n, mask=is_inside, other=0.0).to(tl.float32)
    values, scales = quantise(x, SMALLEST_MAXIMUM, FP8_MAX, IS_INTERPRETED)
    tl.store(values_ptr + row * width + n, values, mask=is_inside)
    tl.store(scales_ptr + row * num_groups + group, scales, mask=group < num_groups)
