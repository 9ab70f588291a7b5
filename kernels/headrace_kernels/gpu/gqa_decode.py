"""`headrace_kernels.gqa_decode` in Triton: the query heads of a key/value head are the rows of one tile.

A program takes a range of the batch's pages (`split_plan`) and a key/value head; the heads of one range follow each
other, so that they read its pages at the same time. The kernel is bound by memory, so a tile of 16 rows, most of them
padding when a key/value head has 4 query heads, costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.decode_rows import check_page_tiles
from headrace_kernels.gpu import split_plan
from headrace_kernels.gpu.combine_splits import combine_splits, new_partials
from headrace_kernels.gpu.configs import Config, config
from headrace_kernels.gpu.launch import launch, num_sms, operand_dtype
from headrace_kernels.gpu.split_plan import rows_of_program, split_of
from headrace_kernels.split_ranges import SplitPlan

_LOG2_E = 1.4426950408889634
_LARGEST_HEAD_BLOCK = 64
# A program holds about 100 KiB of tiles at D = 128, so a multiprocessor runs two.
_PROGRAMS_A_SM = 2


def plan_gqa_decode(context_lens: Tensor, page_size: int, num_kv_heads: int) -> SplitPlan:
    """See `headrace_kernels.gqa_decode.plan_gqa_decode`."""
    num_programs = max(_PROGRAMS_A_SM * num_sms(context_lens) // num_kv_heads, 1)
    return split_plan.plan_splits(context_lens, page_size, num_programs=num_programs)


def gqa_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.gqa_decode.gqa_decode`."""
    check_page_tiles(cache.shape[2])
    num_rows, num_heads, width = query.shape
    _, _, page_size, num_kv_heads, _ = cache.shape
    if num_splits is not None:
        splits = split_plan.fixed(context_lens, num_splits)
    else:
        splits = split_plan.planned(plan or plan_gqa_decode(context_lens, page_size, num_kv_heads))
    partial, lse = new_partials(splits, num_heads, width, query)
    group = num_heads // num_kv_heads
    block_heads = min(max(triton.next_power_of_2(group), 16), _LARGEST_HEAD_BLOCK)
    launch(
        _gqa_decode_kernel,
        (num_kv_heads * triton.cdiv(group, block_heads), splits.num_programs),
        query,
        query.stride(0),
        query.stride(1),
        cache,
        block_table,
        block_table.stride(0),
        context_lens,
        *splits.tensors,
        partial,
        lse,
        num_rows,
        scale * _LOG2_E,
        G=num_kv_heads,
        GROUP=group,
        D=width,
        PAGE_SIZE=page_size,
        OPERAND=operand_dtype(query),
        BLOCK_H=block_heads,
        BLOCK_D=max(triton.next_power_of_2(width), 16),
        **splits.constants,
        **_tiles(query, page_size, width),
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    combine_splits(partial, lse, context_lens, splits, page_size, out)
    return out


def _tiles(query: Tensor, page_size: int, width: int) -> Config:
    """Return BLOCK_N, which divides the page, num_warps and num_stages."""
    is_narrow = width * query.element_size() <= 256
    default = {"BLOCK_N": 64 if is_narrow else 16, "num_warps": 4, "num_stages": 4 if is_narrow else 2}
    tiles = config("gqa_decode", f"width {width}, {8 * query.element_size()} bits", default, query)
    # The largest power of two that divides the page is the most of it that a tile can take.
    return {**tiles, "BLOCK_N": min(tiles["BLOCK_N"], page_size & -page_size)}


@triton.jit(do_not_specialize=["block_table_stride", "num_rows"])
def _gqa_decode_kernel(
    query_ptr,
    query_row_stride,
    query_head_stride,
    cache_ptr,
    block_table_ptr,
    block_table_stride,
    context_lens_ptr,
    first_rows_ptr,
    row_starts_ptr,
    range_pages_ptr,
    partial_ptr,
    lse_ptr,
    num_rows,
    score_scale,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERHEAD: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv_head = tl.program_id(0) % G
    offs_m = tl.program_id(0) // G * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_h = kv_head * GROUP + offs_m
    program = tl.program_id(1)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    is_head = offs_m < GROUP
    is_place = is_head[:, None] & (offs_d < D)[None, :]
    first_row, end_row = rows_of_program(program, num_rows, first_rows_ptr, NUM_SPLITS)
    for row_index in range(first_row, end_row):
        row = tl.cast(row_index, tl.int64)
        context_len = tl.load(context_lens_ptr + row)
        first_page, end_page, slot = split_of(
            program, row_index, context_len, row_starts_ptr, range_pages_ptr, PAGE_SIZE, NUM_SPLITS, OVERHEAD
        )
        if first_page < end_page:
            query_ptrs = query_ptr + row * query_row_stride + offs_h[:, None] * query_head_stride + offs_d[None, :]
            query = tl.load(query_ptrs, mask=is_place, other=0.0).to(OPERAND)
            table_ptr = block_table_ptr + row * block_table_stride
            end_token = tl.minimum(end_page * PAGE_SIZE, context_len)
            highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
            weight_sum = tl.zeros((BLOCK_H,), tl.float32)
            acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
            page = tl.load(table_ptr + first_page)
            for token in range(first_page * PAGE_SIZE, end_token, BLOCK_N):
                # A page's values follow its PAGE_SIZE keys.
                cache_row = page.to(tl.int64) * (2 * PAGE_SIZE) + token % PAGE_SIZE + offs_n
                key_ptrs = cache_ptr + (cache_row[:, None] * G + kv_head) * D + offs_d[None, :]
                # One tile ahead, so that the next tile's load need not wait for its page.
                next_token = token + BLOCK_N
                page = tl.load(table_ptr + next_token // PAGE_SIZE, mask=next_token < end_token, other=0)
                is_token = token + offs_n < end_token
                is_inside = is_token[:, None] & (offs_d < D)[None, :]
                key = tl.load(key_ptrs, mask=is_inside, other=0.0).to(OPERAND)
                value = tl.load(key_ptrs + PAGE_SIZE * G * D, mask=is_inside, other=0.0).to(OPERAND)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
                scores = tl.where(is_token[None, :], scores, float("-inf"))
                # Every tile has a token, so `new_highest` is finite.
                new_highest = tl.maximum(highest, tl.max(scores, axis=1))
                weights = tl.exp2(scores - new_highest[:, None])
                correction = tl.exp2(highest - new_highest)
                weight_sum = weight_sum * correction + tl.sum(weights, axis=1)
                acc = tl.dot(weights.to(OPERAND), value, acc * correction[:, None], input_precision="ieee")
                highest = new_highest
            slot_head = slot.to(tl.int64) * (G * GROUP) + offs_h
            tl.store(lse_ptr + slot_head, highest + tl.log2(weight_sum), mask=is_head)
            partial_ptrs = partial_ptr + slot_head[:, None] * D + offs_d[None, :]
            tl.store(partial_ptrs, acc / weight_sum[:, None], mask=is_place)
