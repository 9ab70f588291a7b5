"""`headrace_kernels.split_plan` in Triton, and what the kernels of decode attention read of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.launch import launch
from headrace_kernels.split_ranges import SplitPlan, range_constants

_RANGES_A_PROGRAM = 32
_ROWS_A_STEP = 256


@dataclass(frozen=True, slots=True)
class Splits:
    """How a launch divides its rows: by a plan, or each row alike into a fixed number of splits.

    `tensors` and `constants` are arguments of every kernel that calls `rows_of_program`, `split_of` or `slots_of_row`.
    `lanes` (1 to 16, a power of two) is how many splits of a row are worth combining side by side.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    constants: dict[str, int]
    num_programs: int
    num_slots: int
    lanes: int


def plan_splits(context_lens: Tensor, page_size: int, *, num_programs: int) -> SplitPlan:
    """See `headrace_kernels.split_plan.plan_splits`."""
    (num_rows,) = context_lens.shape
    overhead_pages, min_range = range_constants(page_size)
    row_starts, first_rows, range_pages = (
        torch.empty(length, dtype=torch.int32, device=context_lens.device)
        for length in (num_rows + 1, num_programs + 1, 1)
    )
    launch(
        _plan_splits_kernel,
        (triton.cdiv(num_programs + 1, _RANGES_A_PROGRAM),),
        context_lens,
        row_starts,
        first_rows,
        range_pages,
        num_rows,
        num_programs,
        PAGE_SIZE=page_size,
        OVERHEAD=overhead_pages,
        MIN_RANGE=min_range,
        BLOCK_B=min(triton.next_power_of_2(max(num_rows, 1)), _ROWS_A_STEP),
        BLOCK_N=_RANGES_A_PROGRAM,
    )
    return SplitPlan(row_starts, first_rows, range_pages, page_size, overhead_pages)


def planned(plan: SplitPlan) -> Splits:
    """Return the splits of `plan`."""
    return Splits(
        (plan.first_rows, plan.row_starts, plan.range_pages),
        {"NUM_SPLITS": 0, "OVERHEAD": plan.overhead_pages},
        plan.num_programs,
        plan.num_programs + plan.num_rows,
        _lanes(max(plan.num_programs // max(plan.num_rows, 1), 1)),
    )


def fixed(context_lens: Tensor, num_splits: int) -> Splits:
    """Return `num_splits` splits for every row, at places that depend on that row's length alone."""
    num_programs = context_lens.shape[0] * num_splits
    constants = {"NUM_SPLITS": num_splits, "OVERHEAD": 0}
    return Splits((context_lens,) * 3, constants, num_programs, num_programs, _lanes(num_splits))


def _lanes(num_splits: int) -> int:
    return int(min(triton.next_power_of_2(num_splits), 16))


@triton.jit
def _row_costs(context_lens_ptr, rows, num_rows, PAGE_SIZE: tl.constexpr, OVERHEAD: tl.constexpr):
    """Return what each row takes of the line, in pages."""
    context_lens = tl.load(context_lens_ptr + rows, mask=rows < num_rows, other=0)
    return tl.where(context_lens > 0, tl.cdiv(context_lens, PAGE_SIZE) + OVERHEAD, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _plan_splits_kernel(
    context_lens_ptr,
    row_starts_ptr,
    first_rows_ptr,
    range_pages_ptr,
    num_rows,
    num_programs,
    PAGE_SIZE: tl.constexpr,
    OVERHEAD: tl.constexpr,
    MIN_RANGE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_b = tl.arange(0, BLOCK_B)
    total = 0
    for first in range(0, num_rows, BLOCK_B):
        total += tl.sum(_row_costs(context_lens_ptr, first + offs_b, num_rows, PAGE_SIZE, OVERHEAD), axis=0)
    range_pages = tl.maximum(tl.cdiv(total, num_programs), MIN_RANGE)
    # Every program sums all rows; the first one writes what they share.
    is_first = tl.program_id(0) == 0
    tl.store(range_pages_ptr, range_pages, mask=is_first)
    tl.store(row_starts_ptr + num_rows, total, mask=is_first)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_before = tl.zeros((BLOCK_N,), tl.int32)
    start = 0
    for first in range(0, num_rows, BLOCK_B):
        rows = first + offs_b
        costs = _row_costs(context_lens_ptr, rows, num_rows, PAGE_SIZE, OVERHEAD)
        ends = start + tl.cumsum(costs, axis=0)
        tl.store(row_starts_ptr + rows, ends - costs, mask=is_first & (rows < num_rows))
        is_before = (ends[None, :] <= offs_n[:, None] * range_pages) & (rows < num_rows)[None, :]
        rows_before += tl.sum(is_before.to(tl.int32), axis=1)
        start += tl.sum(costs, axis=0)
    tl.store(first_rows_ptr + offs_n, rows_before, mask=offs_n <= num_programs)


@triton.jit
def rows_of_program(program, num_rows, first_rows_ptr, NUM_SPLITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the first row that `program` may have a split of, and the row after the last."""
    if NUM_SPLITS > 0:
        first = program // NUM_SPLITS
        end = first + 1
    else:
        first = tl.load(first_rows_ptr + program)
        end = tl.minimum(tl.load(first_rows_ptr + program + 1) + 1, num_rows)
    return first, end


@triton.jit
def split_of(
    program,
    row,
    context_len,
    row_starts_ptr,
    range_pages_ptr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERHEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the first page of the split of `program` and `row`, the page after its last, and its slot.

    There is no such split if the second is not above the first.
    """
    num_pages = tl.cdiv(context_len, PAGE_SIZE)
    if NUM_SPLITS > 0:
        pages = tl.cdiv(num_pages, NUM_SPLITS)
        first = program % NUM_SPLITS * pages
        slot = program
    else:
        pages = tl.load(range_pages_ptr)
        first = program * pages - tl.load(row_starts_ptr + row) - OVERHEAD
        slot = program + row
    return tl.maximum(first, 0), tl.minimum(first + pages, num_pages), slot


@triton.jit
def slots_of_row(
    row,
    is_row,
    context_lens_ptr,
    row_starts_ptr,
    range_pages_ptr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERHEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the first slot of `row` and how many hold its splits; 0 where not `is_row` or without context.

    `row` and `is_row` may be tensors of one shape; a place that is no row reads nothing.
    """
    num_pages = tl.cdiv(tl.load(context_lens_ptr + row, mask=is_row, other=0), PAGE_SIZE)
    if NUM_SPLITS > 0:
        pages = tl.maximum(tl.cdiv(num_pages, NUM_SPLITS), 1)
        first = row * NUM_SPLITS
        count = tl.cdiv(num_pages, pages)
    else:
        pages = tl.load(range_pages_ptr)
        begin = tl.load(row_starts_ptr + row, mask=is_row, other=0) + OVERHEAD
        first_program = begin // pages
        first = first_program + row
        count = tl.where(num_pages > 0, (begin + num_pages - 1) // pages - first_program + 1, 0)
    return first, count
