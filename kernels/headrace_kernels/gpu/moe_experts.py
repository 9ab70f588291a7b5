"""`headrace_kernels.moe_experts` in Triton for few tokens: matrix-vector products by the experts as they were chosen.

Two launches. Gate and up: a program for each assignment and few rows of weights. Down: a program for each token and few
rows, which goes over the token's experts in order and adds the residual; nothing else combines. Each thread keeps its
own sums until the end, so what is waited for is memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import GROUP
from headrace_kernels.gpu import configs
from headrace_kernels.gpu.dependent_launch import dependent_launch, wait_for_earlier
from headrace_kernels.gpu.launch import launch
from headrace_kernels.moe_experts import FEW_TOKENS
from headrace_kernels.reference import moe_experts as reference

DEFAULT: configs.Config = {"BLOCK_O": 4, "BLOCK_K": 512, "STAGES": 4, "num_warps": 4}


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    blocks: DeviceBlocks | None,
    residual: Tensor | None,
    first_local: int,
    num_experts: int | None,
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See `headrace_kernels.moe_experts.moe_experts`; tokens that are not few take its steps, each with its launch."""
    if blocks is not None or len(x) > FEW_TOKENS:
        return reference.moe_experts(
            x,
            experts,
            weights,
            gate_up,
            down,
            blocks=blocks,
            residual=residual,
            first_local=first_local,
            num_experts=num_experts,
            scales=scales,
        )
    gate_up_scale, down_scale = scales or (None, None)
    local = range(first_local, first_local + len(gate_up))
    return few_tokens(x, (experts, weights, local), (gate_up, gate_up_scale), (down, down_scale), residual)


def few_tokens(
    x: Tensor,
    routing: tuple[Tensor, Tensor, range],
    gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    residual: Tensor | None,
) -> Tensor:
    """Compute `moe_experts` without sorting; `routing` is experts, weights, and which experts are local."""
    experts, weights, local = routing
    num_tokens, top_k = experts.shape
    _, hidden, width = down[0].shape
    rows = torch.empty((num_tokens * top_k, width), dtype=x.dtype, device=x.device)
    tile = configs.config("moe_experts", f"gate_up {gate_up[0].dtype} {width}x{hidden}", DEFAULT, x)
    launch(
        _few_gate_up_kernel,
        (num_tokens * top_k, triton.cdiv(width, tile["BLOCK_O"])),
        *(x, x.stride(0), *gate_up, experts, local.start, len(local), rows, width, hidden),
        TOP_K=top_k,
        GROUP=GROUP,
        **dependent_launch(x),
        **tile,
    )
    out = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device)
    tile = configs.config("moe_experts", f"down {down[0].dtype} {hidden}x{width}", DEFAULT, x)
    launch(
        _few_down_kernel,
        (num_tokens, triton.cdiv(hidden, tile["BLOCK_O"])),
        *(rows, *down, experts, weights, local.start, len(local), residual, out, hidden, width),
        TOP_K=top_k,
        CHOICES=triton.next_power_of_2(top_k),
        GROUP=GROUP,
        **dependent_launch(x),
        **tile,
    )
    return out


@triton.jit
def _few_gate_up_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    scale_ptr,
    experts_ptr,
    first_local,
    num_local,
    out_ptr,
    width_out,
    width_in,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    if IS_DEPENDENT:
        wait_for_earlier()
    assignment = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts_ptr + assignment).to(tl.int64) - first_local
    if (expert < 0) | (expert >= num_local):
        return
    first = tl.program_id(1) * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    gate_row = expert * 2 * width_out + tl.minimum(o, width_out - 1)
    groups_out = tl.cdiv(width_out, GROUP)
    gate_group = expert * 2 * groups_out + first // GROUP
    gate = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    for start in tl.range(0, width_in, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        is_inside = k < width_in
        x = tl.load(x_ptr + assignment // TOP_K * x_stride + k, mask=is_inside, other=0.0).to(tl.float32)
        gate += _products(x, weight_ptr, gate_row, scale_ptr, gate_group, width_in, k, is_inside, GROUP)
        up_row, up_group = gate_row + width_out, gate_group + groups_out
        up += _products(x, weight_ptr, up_row, scale_ptr, up_group, width_in, k, is_inside, GROUP)
    gate_sum = tl.sum(gate, axis=1)
    out = gate_sum * tl.sigmoid(gate_sum) * tl.sum(up, axis=1)
    tl.store(out_ptr + assignment * width_out + o, out.to(out_ptr.dtype.element_ty), mask=o < width_out)


@triton.jit
def _few_down_kernel(
    rows_ptr,
    weight_ptr,
    scale_ptr,
    experts_ptr,
    weights_ptr,
    first_local,
    num_local,
    residual_ptr,
    out_ptr,
    width_out,
    width_in,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUP: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    if IS_DEPENDENT:
        wait_for_earlier()
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    # Which experts and weights stays in registers, and one loop goes over all: no load waits for its expert.
    choices = tl.arange(0, CHOICES)
    experts = tl.load(experts_ptr + token * TOP_K + choices, mask=choices < TOP_K, other=-1).to(tl.int64) - first_local
    is_local = (choices < TOP_K) & (experts >= 0) & (experts < num_local)
    weights = tl.load(weights_ptr + token * TOP_K + choices, mask=is_local, other=0.0)
    # Of experts that are elsewhere nothing is read.
    experts = tl.where(is_local, experts, -1)
    steps = tl.cdiv(width_in, BLOCK_K)
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):
        choice = step // steps
        expert = tl.sum(tl.where(choices == choice, experts, 0), axis=0)
        weight = tl.sum(tl.where(choices == choice, weights, 0.0), axis=0)
        row = expert * width_out + tl.minimum(o, width_out - 1)
        group = expert * tl.cdiv(width_out, GROUP) + first // GROUP
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        is_inside = (expert >= 0) & (k < width_in)
        x = tl.load(rows_ptr + (token * TOP_K + choice) * width_in + k, mask=is_inside, other=0.0).to(tl.float32)
        acc += _products(x * weight, weight_ptr, row, scale_ptr, group, width_in, k, is_inside, GROUP)
    out = tl.sum(acc, axis=1)
    places = token * width_out + o
    if residual_ptr is not None:
        out += tl.load(residual_ptr + places, mask=o < width_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=o < width_out)


@triton.jit
def _products(x, weight_ptr, row, scale_ptr, group_row, width_in, k, is_inside, GROUP: tl.constexpr):
    """Return `x` [BLOCK_K] times rows of weights [BLOCK_O, BLOCK_K], not summed; `row` and `group_row` are int64."""
    places = weight_ptr + row[:, None] * width_in + k[None, :]
    weight = tl.load(places, mask=is_inside[None, :], other=0.0).to(tl.float32)
    if scale_ptr is not None:
        places = scale_ptr + group_row * tl.cdiv(width_in, GROUP) + k // GROUP
        x = x * tl.load(places, mask=is_inside, other=0.0)
    return weight * x[None, :]
