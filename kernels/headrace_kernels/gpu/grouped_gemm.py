"""`headrace_kernels.grouped_gemm` in Triton: both expert products as one kernel, and the weighted combine.

The grid is persistent: programs take tiles in turn and stop at the number of blocks that the device counted, so that an
expert-parallel shard pays nothing for blocks that are not there. Consecutive tiles are of a few blocks at the same
columns: the blocks of one expert read its weights from the L2 cache.

Which matrix instruction a block gets on Hopper: 16 rows in bfloat16 are the 16 rows of an mma, which the bandwidth of
the weights does not outrun; 32 rows, and all blocks below 64 rows in fp8, are swapped (SWAP_AB: the weights are the
left operand and fill the 64 rows of a wgmma, the tokens are its columns); from 64 rows on a wgmma needs no swapping.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8, FP8_MAX, GROUP, SMALLEST_MAXIMUM
from headrace_kernels.gpu import configs
from headrace_kernels.gpu.dependent_launch import dependent_launch, wait_for_earlier
from headrace_kernels.gpu.fp8 import quantise
from headrace_kernels.gpu.launch import is_interpreted, launch, num_sms, operand_dtype, target

_COMBINE_COLUMNS = 1024


def experts_gate_up(
    x: Tensor, gate_up: Tensor, blocks: DeviceBlocks, scale: Tensor | None, x_scale: Tensor | None
) -> Tensor:
    """See `headrace_kernels.grouped_gemm.experts_gate_up`."""
    out = _empty(x, (len(blocks.assignment), gate_up.shape[1] // 2))
    if len(x):
        _multiply((x, x_scale), (gate_up, scale), out, blocks, blocks.num_assignments // len(x), is_gated=True)
    return out


def experts_down(
    rows: Tensor, down: Tensor, blocks: DeviceBlocks, scale: Tensor | None, rows_scale: Tensor | None
) -> Tensor:
    """See `headrace_kernels.grouped_gemm.experts_down`."""
    out = _empty(rows, (blocks.num_assignments, down.shape[1]))
    _multiply((rows, rows_scale), (down, scale), out, blocks, 1, is_gated=False)
    return out


def combine_assignments(
    rows: Tensor, experts: Tensor, weights: Tensor, local: range, residual: Tensor | None
) -> Tensor:
    """See `headrace_kernels.grouped_gemm.combine_assignments`."""
    num_tokens, top_k = experts.shape
    width = rows.shape[1]
    out = torch.empty((num_tokens, width), dtype=rows.dtype, device=rows.device)
    grid = (num_tokens, triton.cdiv(width, _COMBINE_COLUMNS))
    ids = (experts, weights, local.start, local.stop)
    constants = {"TOP_K": top_k, "BLOCK_N": _COMBINE_COLUMNS, **dependent_launch(rows)}
    launch(_combine_kernel, grid, rows, *ids, residual, out, width, **constants)
    return out


def default_tile(dtype: torch.dtype, block_size: int, is_gated: bool) -> configs.Config:
    """Return the tile for blocks of `block_size` rows. BLOCK_N counts gate columns; as many of up come with them."""
    narrow = 2 if is_gated else 1
    is_hip = target() == "hip"
    if dtype == torch.float32:
        # Without matrix units 4 warps lack registers for 128 rows; of 8 warps, too, two programs fit a multiprocessor.
        return _tile(32, 32, 8 if block_size == 128 and not is_hip else 4, 2, per_sm=2)
    if dtype == FP8:
        is_large = block_size == 128
        return _tile(
            128 // narrow,
            128,
            8 if is_large else 4,
            2 if is_hip else 3,
            per_sm=1 if is_large else 3 if block_size == 16 else 2,
            is_swapped=block_size < 64,
        )
    if block_size == 16:
        return _tile(128 // narrow, 128, 4, 2 if is_hip else 3, per_sm=3)
    if block_size < 128:
        return _tile(128 // narrow, 64, 4, 2 if is_hip else 4, per_sm=2, is_swapped=block_size == 32)
    return _tile(256 // narrow, 64, 8, 2 if is_hip else 4, per_sm=1)


def key(weight: Tensor, block_size: int, is_gated: bool) -> str:
    """Return what names a product with `weight` [E, O, I] in the table of configurations."""
    _, width_out, width_in = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{'gate_up' if is_gated else 'down'} {dtype} {block_size}x{width_out}x{width_in}"


def _tile(
    block_n: int, block_k: int, num_warps: int, num_stages: int, *, per_sm: int, is_swapped: bool = False
) -> configs.Config:
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "SWAP_AB": int(is_swapped),
        "PROGRAMS_PER_SM": per_sm,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _empty(x: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16 if x.dtype == FP8 else x.dtype, device=x.device)


def _multiply(
    x: tuple[Tensor, Tensor | None],
    weight: tuple[Tensor, Tensor | None],
    out: Tensor,
    blocks: DeviceBlocks,
    rows_per_source: int,
    *,
    is_gated: bool,
) -> None:
    """Launch the product of rows (and their scales) with weights (and theirs)."""
    values = weight[0]
    width_out, width_in = out.shape[1], values.shape[2]
    default = default_tile(values.dtype, blocks.block_size, is_gated)
    tile = dict(configs.config("grouped_gemm", key(values, blocks.block_size, is_gated), default, values))
    most_tiles = len(blocks.block_expert) * triton.cdiv(width_out, tile["BLOCK_N"])
    grid = (min(most_tiles, num_sms(values) * tile.pop("PROGRAMS_PER_SM")),)
    is_scaled = weight[1] is not None
    launch(
        _expert_gemm_kernel,
        grid,
        *(x[0], x[0].stride(0), x[1], *weight, out),
        *(blocks.assignment, blocks.block_expert, blocks.num_blocks),
        *(blocks.num_assignments, rows_per_source, width_out, width_in),
        BLOCK_M=blocks.block_size,
        IS_GATED=is_gated,
        IS_SCALED=is_scaled,
        IS_QUANTISED_HERE=is_scaled and x[1] is None,
        IS_EVEN=width_in % tile["BLOCK_K"] == 0,
        GROUP=GROUP,
        SMALLEST_MAXIMUM=SMALLEST_MAXIMUM,
        FP8_MAX=FP8_MAX,
        IS_INTERPRETED=is_interpreted(),
        OPERAND=_operand(values),
        **dependent_launch(values),
        **tile,
    )


def _operand(weight: Tensor) -> tl.dtype:
    """Return what values are multiplied as: gfx942 has fp8 matrix instructions for another fp8 than the weights'."""
    return tl.bfloat16 if weight.dtype == FP8 and target() == "hip" else operand_dtype(weight)


@triton.jit(do_not_specialize=["num_assignments"])
def _expert_gemm_kernel(
    x_ptr,
    x_stride,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    assignment_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    num_assignments,
    rows_per_source,
    width_out,
    width_in,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP_AB: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_QUANTISED_HERE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    SMALLEST_MAXIMUM: tl.constexpr,
    FP8_MAX: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    if IS_DEPENDENT:
        wait_for_earlier()
    halves: tl.constexpr = 2 if IS_GATED else 1
    groups_in = tl.cdiv(width_in, GROUP)
    groups_out = tl.cdiv(width_out, GROUP)
    num_blocks = tl.load(num_blocks_ptr)
    num_tiles = tl.cdiv(width_out, BLOCK_N)
    for job in tl.range(tl.program_id(0), num_blocks * num_tiles, tl.num_programs(0)):
        block, tile = _place(job, num_blocks, num_tiles, GROUP_M)
        expert = tl.load(block_expert_ptr + block).to(tl.int64)
        if expert >= 0:
            row = block * BLOCK_M + tl.arange(0, BLOCK_M)
            assignment = tl.load(assignment_ptr + row)
            is_row = assignment < num_assignments
            source = (assignment // rows_per_source if IS_GATED else row).to(tl.int64)
            # Columns past the end multiply the last one's weights and are not stored.
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            weight_rows = weight_ptr + (expert * halves * width_out + tl.minimum(n, width_out - 1)) * width_in
            scale_row = (expert * halves * groups_out + tile * BLOCK_N // GROUP) * groups_in
            gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, BLOCK_N), tl.float32)
            up = gate
            for start in tl.range(0, width_in, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                is_inside = (k < width_in) | IS_EVEN
                group = start // GROUP
                x_places = x_ptr + source[:, None] * x_stride + k[None, :]
                x = tl.load(x_places, mask=is_row[:, None] & is_inside[None, :], other=0.0)
                if IS_QUANTISED_HERE:
                    x, x_scale = quantise(x.to(tl.float32), SMALLEST_MAXIMUM, FP8_MAX, IS_INTERPRETED)
                elif IS_SCALED:
                    x_scale = tl.load(x_scale_ptr + source * groups_in + group, mask=is_row, other=0.0)
                else:
                    x_scale = 1.0
                x = x.to(OPERAND)
                weight = _load_weight(weight_rows, k, is_inside, OPERAND)
                gate = _add_product(gate, x, x_scale, weight, scale_ptr, scale_row + group, SWAP_AB, IS_SCALED)
                if IS_GATED:
                    weight = _load_weight(weight_rows + tl.cast(width_out, tl.int64) * width_in, k, is_inside, OPERAND)
                    up_scale = scale_row + groups_out * groups_in + group
                    up = _add_product(up, x, x_scale, weight, scale_ptr, up_scale, SWAP_AB, IS_SCALED)
            out = gate * tl.sigmoid(gate) * up if IS_GATED else gate
            places = out_ptr + (row if IS_GATED else assignment).to(tl.int64)[:, None] * width_out + n[None, :]
            out = (tl.trans(out) if SWAP_AB else out).to(out_ptr.dtype.element_ty)
            tl.store(places, out, mask=is_row[:, None] & (n < width_out)[None, :])


@triton.jit
def _place(job, num_blocks, num_tiles, GROUP_M: tl.constexpr):
    """Return the block and tile of columns of a job: GROUP_M blocks at the same columns, then at the next."""
    per_group = GROUP_M * num_tiles
    first = job // per_group * GROUP_M
    size = tl.minimum(num_blocks - first, GROUP_M)
    within = job % per_group
    return first + within % size, within // size


@triton.jit
def _load_weight(weight_rows, k, is_inside, OPERAND: tl.constexpr):
    return tl.load(weight_rows[:, None] + k[None, :], mask=is_inside[None, :], other=0.0).to(OPERAND)


@triton.jit
def _add_product(acc, x, x_scale, weight, scale_ptr, scale_at, SWAP_AB: tl.constexpr, IS_SCALED: tl.constexpr):
    """Return `acc` plus `x` [BLOCK_M, BLOCK_K] times `weight` [BLOCK_N, BLOCK_K]; transposed when swapped."""
    left, right = (weight, tl.trans(x)) if SWAP_AB else (x, tl.trans(weight))
    if IS_SCALED:
        scale = x_scale * tl.load(scale_ptr + scale_at)
        scale = scale[None, :] if SWAP_AB else scale[:, None]
        return acc + tl.dot(left, right, input_precision="ieee") * scale
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _combine_kernel(
    rows_ptr,
    experts_ptr,
    weights_ptr,
    first_local,
    end_local,
    residual_ptr,
    out_ptr,
    width,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    if IS_DEPENDENT:
        wait_for_earlier()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_inside = n < width
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + token * TOP_K + k)
        is_local = (expert >= first_local) & (expert < end_local)
        weight = tl.load(weights_ptr + token * TOP_K + k, mask=is_local, other=0.0)
        place = rows_ptr + (token * TOP_K + k) * width + n
        row = tl.load(place, mask=is_inside & is_local, other=0.0).to(tl.float32)
        total += row * weight
    if residual_ptr is not None:
        total += tl.load(residual_ptr + token * width + n, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + n, total.to(out_ptr.dtype.element_ty), mask=is_inside)
