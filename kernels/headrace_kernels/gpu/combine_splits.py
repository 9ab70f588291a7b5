"""Combining the splits of decode attention: partial results in, one result a row and head out.

A split leaves its average of the values, `partial` [D] in float32, and `lse`, the log2 of its softmax's denominator.
A row's result is the average of its splits' partials weighted by 2^lse. Partials are S slots of all heads; which slots
are a row's, `split_plan.slots_of_row` says. Slots that hold no split are never read. A row without splits gives zeros.

What is moved is 2 * splits * H * (D + 1) * 4 bytes, written and read again, in the L2 cache as long as they fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.launch import launch
from headrace_kernels.gpu.split_plan import Splits, slots_of_row


def new_partials(splits: Splits, num_heads: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for partials [S, H, D] and their lse [S, H], both float32, uninitialised, where `like` is."""
    partial = torch.empty((splits.num_slots, num_heads, width), dtype=torch.float32, device=like.device)
    return partial, torch.empty((splits.num_slots, num_heads), dtype=torch.float32, device=like.device)


def combine_splits(
    partial: Tensor, lse: Tensor, context_lens: Tensor, splits: Splits, page_size: int, out: Tensor
) -> None:
    """Write to `out` [B, H, D], contiguous, the results of the rows whose splits lie in `partial` and `lse`."""
    num_rows, num_heads, width = out.shape
    launch(
        _combine_splits_kernel,
        (num_heads, num_rows),
        partial,
        lse,
        context_lens,
        *splits.tensors,
        out,
        H=num_heads,
        D=width,
        PAGE_SIZE=page_size,
        LANES=splits.lanes,
        BLOCK_D=triton.next_power_of_2(width),
        **splits.constants,
    )


@triton.jit
def combined_lanes(
    partial_ptr,
    lse_ptr,
    first_slot,
    count,
    lane,
    most,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Return [M, BLOCK_D] float32: for each of M lanes, its share of its row's result; the shares add up to it.

    Lane m takes every LANES-th of the `count[m]` splits from slot `first_slot[m]`, beginning with the `lane[m]`-th;
    `most` is the largest count.
    """
    BLOCK_S: tl.constexpr = 64
    offs_s = tl.arange(0, BLOCK_S)
    first_slot = first_slot.to(tl.int64)
    highest = tl.full(lane.shape, float("-inf"), tl.float32)
    weight_sum = tl.zeros(lane.shape, tl.float32)
    for start in range(0, most, BLOCK_S):
        is_split = (start + offs_s)[None, :] < count[:, None]
        lse_ptrs = lse_ptr + (first_slot[:, None] + start + offs_s[None, :]) * H + head
        lse = tl.load(lse_ptrs, mask=is_split, other=float("-inf"))
        new_highest = tl.maximum(highest, tl.max(lse, axis=1))
        # A lane without splits stays at -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight_sum = weight_sum * tl.exp2(highest - base) + tl.sum(tl.exp2(lse - base[:, None]), axis=1)
        highest = new_highest
    lse_of_row = tl.where(count > 0, highest + tl.log2(tl.where(count > 0, weight_sum, 1.0)), 0.0)
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros((lane.shape[0], BLOCK_D), tl.float32)
    for start in tl.range(0, most, LANES, num_stages=3):
        is_split = start + lane < count
        slot_head = (first_slot + start + lane) * H + head
        weight = tl.exp2(tl.load(lse_ptr + slot_head, mask=is_split, other=float("-inf")) - lse_of_row)
        is_inside = is_split[:, None] & (offs_d < D)[None, :]
        total += weight[:, None] * tl.load(
            partial_ptr + slot_head[:, None] * D + offs_d[None, :], mask=is_inside, other=0.0
        )
    return total


@triton.jit
def _combine_splits_kernel(
    partial_ptr,
    lse_ptr,
    context_lens_ptr,
    first_rows_ptr,
    row_starts_ptr,
    range_pages_ptr,
    out_ptr,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERHEAD: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    lane = tl.arange(0, LANES)
    rows = row + tl.zeros_like(lane)
    first_slot, count = slots_of_row(
        rows, rows >= 0, context_lens_ptr, row_starts_ptr, range_pages_ptr, PAGE_SIZE, NUM_SPLITS, OVERHEAD
    )
    most = tl.max(count, axis=0)
    lanes = combined_lanes(partial_ptr, lse_ptr, first_slot, count, lane, most, head, H, D, LANES, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + (row.to(tl.int64) * H + head) * D + offs_d
    tl.store(out_ptrs, tl.sum(lanes, axis=0).to(out_ptr.dtype.element_ty), mask=offs_d < D)
