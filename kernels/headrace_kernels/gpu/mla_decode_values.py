"""`headrace_kernels.mla_decode.mla_decode_values` in Triton: splits are combined where W_UV multiplies them.

The second launch tiles heads, value columns and rows. A tile's 16 lanes are rows, each with as many lanes as it has
splits to combine side by side: the lanes' shares are multiplied by W_UV, and the products of a row's lanes are summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.decode_rows import check_page_tiles
from headrace_kernels.gpu.combine_splits import combined_lanes
from headrace_kernels.gpu.dependent_launch import dependent_launch, prefetch_rows, wait_for_earlier
from headrace_kernels.gpu.launch import launch, num_sms, operand_dtype, target
from headrace_kernels.gpu.mla_decode import attend, splits_for
from headrace_kernels.gpu.split_plan import Splits, slots_of_row
from headrace_kernels.split_ranges import SplitPlan

_LANES = 16


def mla_decode_values(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.mla_decode.mla_decode_values`."""
    check_page_tiles(cache.shape[1])
    num_rows, num_heads, _ = query.shape
    _, value_dim, kv_lora_rank = w_uv.shape
    splits = splits_for(query, cache, context_lens, plan, num_splits)
    partial, lse = attend(query, cache, block_table, context_lens, splits, kv_lora_rank=kv_lora_rank, scale=scale)
    out = torch.empty((num_rows, num_heads * value_dim), dtype=query.dtype, device=query.device)
    block_values = _block_values(w_uv, num_rows if num_splits is None else 1, splits)
    launch(
        _combine_values_kernel,
        (triton.cdiv(value_dim, block_values), num_heads, triton.cdiv(num_rows, _LANES // splits.lanes)),
        partial,
        lse,
        context_lens,
        *splits.tensors,
        w_uv,
        out,
        num_rows,
        H=num_heads,
        DV=value_dim,
        D=kv_lora_rank,
        PAGE_SIZE=cache.shape[1],
        ROWS=_LANES // splits.lanes,
        LANES=splits.lanes,
        OPERAND=operand_dtype(query),
        BLOCK_V=block_values,
        BLOCK_D=max(triton.next_power_of_2(kv_lora_rank), 16),
        num_warps=8,
        **splits.constants,
        **dependent_launch(query),
    )
    return out


def _block_values(w_uv: Tensor, num_rows: int, splits: Splits) -> int:
    """Return the widest tile of value columns that still gives every multiprocessor one."""
    num_heads, value_dim, _ = w_uv.shape
    tiles_a_column_block = num_heads * triton.cdiv(num_rows, _LANES // splits.lanes)
    # A gfx942 would spill registers with more.
    most = 32 if target() == "hip" else 64
    widest = int(min(max(triton.next_power_of_2(value_dim), 16), most))
    while widest > 16 and tiles_a_column_block * triton.cdiv(value_dim, widest) < num_sms(w_uv):
        widest //= 2
    return widest


@triton.jit(do_not_specialize=["num_rows"])
def _combine_values_kernel(
    partial_ptr,
    lse_ptr,
    context_lens_ptr,
    first_rows_ptr,
    row_starts_ptr,
    range_pages_ptr,
    w_uv_ptr,
    out_ptr,
    num_rows,
    H: tl.constexpr,
    DV: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    head = tl.program_id(1)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    if IS_DEPENDENT:
        values = head.to(tl.int64) * DV + tl.minimum(offs_v, DV - 1)
        prefetch_rows(w_uv_ptr + values * D, D, max(BLOCK_D * w_uv_ptr.dtype.element_ty.primitive_bitwidth // 1024, 1))
        wait_for_earlier()
    offs_d = tl.arange(0, BLOCK_D)
    w_uv_ptrs = w_uv_ptr + (head.to(tl.int64) * DV + offs_v[:, None]) * D + offs_d[None, :]
    is_weight = (offs_v < DV)[:, None] & (offs_d < D)[None, :]
    w_uv = tl.load(w_uv_ptrs, mask=is_weight, other=0.0).to(OPERAND)
    lanes = tl.arange(0, ROWS * LANES)
    rows = tl.program_id(2) * ROWS + lanes // LANES
    first_slot, count = slots_of_row(
        rows, rows < num_rows, context_lens_ptr, row_starts_ptr, range_pages_ptr, PAGE_SIZE, NUM_SPLITS, OVERHEAD
    )
    most = tl.max(count, axis=0)
    latents = combined_lanes(partial_ptr, lse_ptr, first_slot, count, lanes % LANES, most, head, H, D, LANES, BLOCK_D)
    values = tl.dot(latents.to(OPERAND), tl.trans(w_uv), input_precision="ieee")
    values = tl.sum(tl.reshape(values, (ROWS, LANES, BLOCK_V)), axis=1)
    out_rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    is_value = (out_rows < num_rows)[:, None] & (offs_v < DV)[None, :]
    out_ptrs = out_ptr + (out_rows.to(tl.int64)[:, None] * H + head) * DV + offs_v[None, :]
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=is_value)
