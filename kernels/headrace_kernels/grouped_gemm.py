"""Multiply each block of rows by the weight of its expert: the third step of a mixture-of-experts layer.

Shapes: T tokens, N hidden, K experts per token, E experts held here, I width of an expert, O outputs of a product, rows
in the order of the blocks. Bytes read for few tokens: the weights of the experts hit, each once, 3 * N * I * itemsize;
FLOPs: 2 * rows * 3 * N * I. So memory bandwidth bounds it until an expert has some 200 rows, matrix units beyond.

For stacked weights, on a GPU, three launches: `experts_gate_up`, `experts_down`, `combine_assignments`, each with its
specification `..._ref`; lists of packed weights have `packed_experts`. Weights are float32, bfloat16, or float8_e4m3fn
with one scale for each block of 128 x 128; then products are accumulated in float32 after every 128 inputs, and
activations are quantised in groups of 128 (`act_quant`). Nothing is summed by atomics: a row's result depends on the
tile sizes alone, not on the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.act_quant import act_quant_ref, dequantise
from headrace_kernels.dispatch import select
from headrace_kernels.expert_blocks import DeviceBlocks
from headrace_kernels.fp8_groups import FP8, GROUP, num_groups

BLOCK_SIZES = (16, 32, 64, 128)
"""Rows of a block that the stacked products have tiles for."""


def experts_gate_up(
    x: Tensor, gate_up: Tensor, blocks: DeviceBlocks, scale: Tensor | None = None, x_scale: Tensor | None = None
) -> Tensor:
    """Return silu(gate) * up of every row's token and expert.

    Args:
        x: [T, N], dtype of `gate_up`; bfloat16 or float8_e4m3fn when that is float8_e4m3fn.
        gate_up: [E, 2 * I, N], contiguous: gate rows, then up rows.
        blocks: which token and expert each row is of; block sizes 16, 32, 64, 128. Row r is of token
            `assignment[r] // K`.
        scale: for float8 weights, [E, 2 * ceil(I / 128), ceil(N / 128)] float32: the gate's, then the up's.
        x_scale: for float8 `x`, [T, ceil(N / 128)] float32, from `act_quant`; the kernel quantises
            a bfloat16 `x` itself.

    Returns:
        [rows, I], dtype of `x`; bfloat16 for float8. Rows of padding are not written.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_product(x, gate_up, blocks, scale, x_scale)
    width = gate_up.shape[1] // 2
    if gate_up.shape[1] % 2 or (scale is not None and scale.shape[1] != 2 * num_groups(width)):
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must hold gate and up, each with its own scales")
    if len(x) and blocks.num_assignments % len(x):
        raise ValueError(f"{blocks.num_assignments} assignments are not a multiple of {len(x)} tokens")
    return select("grouped_gemm", x).experts_gate_up(x, gate_up, blocks, scale, x_scale)


def experts_gate_up_ref(
    x: Tensor, gate_up: Tensor, blocks: DeviceBlocks, scale: Tensor | None = None, x_scale: Tensor | None = None
) -> Tensor:
    """Specification of `experts_gate_up` in plain torch; rows of padding are zero."""
    row, expert = _live_rows(blocks)
    top_k = blocks.num_assignments // max(len(x), 1)
    token = blocks.assignment[row].long() // max(top_k, 1)
    halves, half_scales = gate_up.unflatten(1, (2, -1)), None if scale is None else scale.unflatten(1, (2, -1))
    gate, up = _times_experts(_activations(x, scale, x_scale)[token], halves, half_scales, expert).unbind(1)
    out = x.new_zeros((len(blocks.assignment), halves.shape[2]), dtype=_result_dtype(x))
    out[row] = (F.silu(gate) * up).to(out.dtype)
    return out


def experts_down(
    rows: Tensor, down: Tensor, blocks: DeviceBlocks, scale: Tensor | None = None, rows_scale: Tensor | None = None
) -> Tensor:
    """Return every row times its expert, at the place of its assignment.

    Args:
        rows: [rows, I], from `experts_gate_up`; rows of padding are not read.
        down: [E, N, I], contiguous; dtypes as there.
        blocks: as there.
        scale: for float8 weights, [E, ceil(N / 128), ceil(I / 128)] float32.
        rows_scale: for float8 `rows`, [rows, ceil(I / 128)] float32.

    Returns:
        [T * K, N], dtype of `rows`; bfloat16 for float8. Assignments that are in no block are not written.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_product(rows, down, blocks, scale, rows_scale)
    if len(rows) != len(blocks.assignment) or (scale is not None and scale.shape[1] != num_groups(down.shape[1])):
        raise ValueError(f"rows {tuple(rows.shape)}, down {tuple(down.shape)}: {len(blocks.assignment)} rows in blocks")
    return select("grouped_gemm", rows).experts_down(rows, down, blocks, scale, rows_scale)


def experts_down_ref(
    rows: Tensor, down: Tensor, blocks: DeviceBlocks, scale: Tensor | None = None, rows_scale: Tensor | None = None
) -> Tensor:
    """Specification of `experts_down` in plain torch; assignments that are in no block are zero."""
    row, expert = _live_rows(blocks)
    product = _times_experts(_activations(rows, scale, rows_scale)[row], down, scale, expert)
    out = rows.new_zeros((blocks.num_assignments, down.shape[1]), dtype=_result_dtype(rows))
    out[blocks.assignment[row].long()] = product.to(out.dtype)
    return out


def combine_assignments(
    rows: Tensor,
    experts: Tensor,
    weights: Tensor,
    local: range,
    residual: Tensor | None = None,
) -> Tensor:
    """Return each token's weighted sum over its experts, those that are held here, in the order of k.

    Args:
        rows: [T * K, N], from `experts_down`; those of experts that are not in `local` are not read.
        experts: [T, K] int32 or int64.
        weights: [T, K] float32.
        local: the experts that are held here.
        residual: [T, N], added; None: nothing is.

    Returns:
        [T, N], dtype of `rows`; summed in float32.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_routing(experts, weights)
    if rows.shape[:1] != (experts.numel(),) or not rows.is_contiguous():
        raise ValueError(f"rows {tuple(rows.shape)} must be contiguous and one an assignment of {tuple(experts.shape)}")
    check_residual(residual, rows.dtype, (len(experts), rows.shape[1]))
    return select("grouped_gemm", rows).combine_assignments(rows, experts, weights, local, residual)


def combine_assignments_ref(
    rows: Tensor, experts: Tensor, weights: Tensor, local: range, residual: Tensor | None = None
) -> Tensor:
    """Specification of `combine_assignments` in plain torch."""
    is_local = (experts >= local.start) & (experts < local.stop)
    per_token = rows.float().view(*experts.shape, rows.shape[1]).masked_fill(~is_local[:, :, None], 0.0)
    out = (per_token * weights.masked_fill(~is_local, 0.0)[:, :, None]).sum(dim=1)
    return (out if residual is None else out + residual.float()).to(rows.dtype)


def stacked_float(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return stacked weights as the specifications multiply them: in float32, scaled."""
    return weight.float() if scale is None else dequantise(weight, scale)


def check_routing(experts: Tensor, weights: Tensor) -> None:
    """Raise ValueError unless `experts` are [T, K] integers and `weights` [T, K] float32, both contiguous."""
    is_fitting = experts.dtype in (torch.int32, torch.int64) and weights.dtype == torch.float32
    if not is_fitting or experts.ndim != 2 or experts.shape != weights.shape:
        raise ValueError(
            f"experts {tuple(experts.shape)} {experts.dtype} and weights {tuple(weights.shape)} {weights.dtype} "
            "must be [T, K], integers and float32"
        )
    if not (experts.is_contiguous() and weights.is_contiguous()):
        raise ValueError("experts and weights must be contiguous")


def check_residual(residual: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Raise ValueError unless `residual` is None or contiguous, of that dtype and shape."""
    if residual is not None and (residual.dtype != dtype or residual.shape != shape or not residual.is_contiguous()):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} must be contiguous {shape} {dtype}")


def check_weights(weight: Tensor, scale: Tensor | None) -> None:
    """Raise ValueError unless `weight` is [E, O, I] and contiguous, with scales if and only if it is float8."""
    if weight.ndim != 3 or not weight.is_contiguous() or (weight.dtype == FP8) != (scale is not None):
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} must be [E, O, I], contiguous; scales for float8"
        )
    if scale is not None and (
        scale.dtype != torch.float32
        or not scale.is_contiguous()
        or scale.shape[::2] != (len(weight), num_groups(weight.shape[2]))
    ):
        raise ValueError(f"scale {tuple(scale.shape)} {scale.dtype} must be float32, one a block of {GROUP} x {GROUP}")


def _check_product(
    x: Tensor, weight: Tensor, blocks: DeviceBlocks, scale: Tensor | None, x_scale: Tensor | None
) -> None:
    check_weights(weight, scale)
    dtypes = (torch.bfloat16, FP8) if weight.dtype == FP8 else (weight.dtype,)
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[1] != weight.shape[2] or x.dtype not in dtypes:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}")
    scale_shape = None if x_scale is None else x_scale.shape
    if scale_shape != ((len(x), num_groups(x.shape[1])) if x.dtype == FP8 else None):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit its scales {scale_shape}")
    if blocks.block_size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {blocks.block_size} rows; there are tiles for {BLOCK_SIZES}")


def _live_rows(blocks: DeviceBlocks) -> tuple[Tensor, Tensor]:
    """Return the rows that hold assignments, and their experts."""
    expert = blocks.block_expert.repeat_interleave(blocks.block_size)
    row = ((blocks.assignment < blocks.num_assignments) & (expert >= 0)).nonzero().squeeze(1)
    return row, expert[row].long()


def _times_experts(rows: Tensor, weight: Tensor, scale: Tensor | None, expert: Tensor) -> Tensor:
    """Return `rows` [R, I] times the weights [E, .., O, I] of their experts [R], [R, .., O] float32.

    One expert at a time: a real layer's weights in float32, or a copy for every row, are more than a GPU has left.
    """
    out = rows.new_empty((len(rows), *weight.shape[1:-1]))
    for one in expert.unique().tolist():
        mine = expert == one
        dense = stacked_float(weight[one], None if scale is None else scale[one])
        out[mine] = torch.einsum("ri,...oi->r...o", rows[mine], dense)
    return out


def _activations(x: Tensor, scale: Tensor | None, x_scale: Tensor | None) -> Tensor:
    if scale is None:
        return x.float()
    values, scales = act_quant_ref(x) if x_scale is None else (x, x_scale)
    return dequantise(values, scales)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == FP8 else x.dtype
