"""`headrace_kernels.mla_decode` in Triton: a tile of cache rows is loaded once and is both keys and values.

A program takes a range of the batch's pages (`split_plan`) and a block of heads. The D latent and R rope columns of a
row are two dots, so that no column is padded. With 64 heads a program both dots are wide enough for wgmma; with 16
heads the kernel is bound by memory and m16n8k16 suffices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.decode_rows import check_page_tiles
from headrace_kernels.fp8_groups import FP8, GROUP, num_groups
from headrace_kernels.gpu import split_plan
from headrace_kernels.gpu.combine_splits import combine_splits, new_partials
from headrace_kernels.gpu.configs import Config, config
from headrace_kernels.gpu.dependent_launch import dependent_launch, wait_for_earlier
from headrace_kernels.gpu.launch import launch, num_sms, operand_dtype, target
from headrace_kernels.gpu.split_plan import Splits, rows_of_program, split_of
from headrace_kernels.split_ranges import SplitPlan

_LOG2_E = 1.4426950408889634


def plan_mla_decode(context_lens: Tensor, page_size: int, num_heads: int) -> SplitPlan:
    """See `headrace_kernels.mla_decode.plan_mla_decode`."""
    head_blocks = triton.cdiv(num_heads, _block_heads(num_heads))
    num_programs = max(num_sms(context_lens) * _programs_of_sm(num_heads) // head_blocks, 1)
    return split_plan.plan_splits(context_lens, page_size, num_programs=num_programs)


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    slots: Tensor | None,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> Tensor:
    """See `headrace_kernels.mla_decode.mla_decode`."""
    check_page_tiles(cache.shape[1])
    splits = splits_for(query, cache, context_lens, plan, num_splits)
    partial, lse = attend(query, cache, block_table, context_lens, splits, kv_lora_rank=kv_lora_rank, scale=scale)
    out = torch.empty((*query.shape[:2], kv_lora_rank), dtype=query.dtype, device=query.device)
    combine_splits(partial, lse, context_lens, splits, cache.shape[1], out)
    return out


def splits_for(
    query: Tensor, cache: Tensor, context_lens: Tensor, plan: SplitPlan | None, num_splits: int | None
) -> Splits:
    """Return how to divide the rows: `num_splits` for each, or by `plan`, or by a plan made now."""
    if num_splits is not None:
        return split_plan.fixed(context_lens, num_splits)
    return split_plan.planned(plan or plan_mla_decode(context_lens, cache.shape[1], query.shape[1]))


def attend(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    splits: Splits,
    *,
    kv_lora_rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the partials and their lse (see `combine_splits`) of every split; arguments as those of `mla_decode`."""
    num_rows, num_heads, width = query.shape
    rope_dim, block_heads = width - kv_lora_rank, _block_heads(num_heads)
    partial, lse = new_partials(splits, num_heads, kv_lora_rank, query)
    latents, scales, rope, layout = _views(cache, kv_lora_rank)
    launch(
        _mla_decode_kernel,
        (triton.cdiv(num_heads, block_heads), splits.num_programs),
        query,
        query.stride(0),
        query.stride(1),
        latents,
        scales,
        rope,
        block_table,
        block_table.stride(0),
        context_lens,
        *splits.tensors,
        partial,
        lse,
        num_rows,
        scale * _LOG2_E,
        H=num_heads,
        D=kv_lora_rank,
        R=rope_dim,
        PAGE_SIZE=cache.shape[1],
        OPERAND=operand_dtype(query),
        BLOCK_H=block_heads,
        # Of fp8 rows a tile has whole groups.
        BLOCK_D=max(triton.next_power_of_2(kv_lora_rank), layout["SCALE_GROUP"], 16),
        BLOCK_R=max(triton.next_power_of_2(rope_dim), 16),
        **layout,
        **splits.constants,
        **dependent_launch(query),
        **_tiles(query, cache),
    )
    return partial, lse


def _views(cache: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """Return the latents, scales and rope columns of `cache`, views that all begin at its first byte, and their layout.

    The layout is the length of a row and the place of the part in it, in elements of its view; SCALE_GROUP columns
    share a scale, 0 if there are none.
    """
    width = cache.shape[2]
    layout = {"LATENT_ROW": width, "ROPE_ROW": width, "ROPE_START": kv_lora_rank}
    if cache.dtype != torch.uint8:
        return cache, cache, cache, layout | {"SCALE_ROW": 0, "SCALE_START": 0, "SCALE_GROUP": 0}
    rope_byte = kv_lora_rank + num_groups(kv_lora_rank) * 4
    layout |= {"ROPE_ROW": width // 2, "ROPE_START": rope_byte // 2}
    layout |= {"SCALE_ROW": width // 4, "SCALE_START": kv_lora_rank // 4, "SCALE_GROUP": GROUP}
    return cache.view(FP8), cache.view(torch.float32), cache.view(torch.bfloat16), layout


def _block_heads(num_heads: int) -> int:
    if num_heads <= 16:
        return 16
    # With 64 heads fp8 rows would spill registers of a gfx942.
    return 32 if target() == "hip" else 64


def _programs_of_sm(num_heads: int) -> int:
    """Return how many programs a multiprocessor runs at once with the default tiles.

    One's products, softmax and second products wait for each other; two take turns.
    """
    return 2 if _block_heads(num_heads) == 16 and target() == "cuda" else 1


def _tiles(query: Tensor, cache: Tensor) -> Config:
    """Return BLOCK_N, which divides the page, num_warps and num_stages."""
    block_heads = _block_heads(query.shape[1])
    bits = 8 * cache.element_size()
    # The most that compiles without spilling registers, twice on a multiprocessor where a program has 16 heads; nothing
    # here is measured yet.
    default = {"BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    if target() == "hip":
        default = {"BLOCK_N": 32 if block_heads == 16 and bits == 16 else 16, "num_warps": 4, "num_stages": 1}
    elif bits == 32:
        default |= {"BLOCK_N": 16, "num_stages": 2}
    elif block_heads == 16:
        default = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3 if bits == 16 else 4}
    elif bits == 16:
        default |= {"BLOCK_N": 32}
    tiles = config("mla_decode", f"heads {block_heads}, {bits} bits", default, query)
    page_size = cache.shape[1]
    # The largest power of two that divides the page is the most of it that a tile can take.
    return {**tiles, "BLOCK_N": min(tiles["BLOCK_N"], page_size & -page_size)}


@triton.jit
def _load_latents(
    latent_ptr,
    scale_ptr,
    page_row,
    rows,
    is_token,
    D: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    SCALE_START: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the latents [BLOCK_N, BLOCK_D] of rows `rows` of the page that begins at cache row `page_row`.

    There are zeros where not `is_token`, and from column D.
    """
    offs_d = tl.arange(0, BLOCK_D)
    is_inside = is_token[:, None] if D == BLOCK_D else is_token[:, None] & (offs_d < D)[None, :]
    latents = tl.load(
        latent_ptr + page_row * LATENT_ROW + (rows[:, None] * LATENT_ROW + offs_d[None, :]), mask=is_inside, other=0.0
    )
    if SCALE_GROUP > 0:
        GROUPS: tl.constexpr = BLOCK_D // SCALE_GROUP
        offs_g = tl.arange(0, GROUPS)
        is_scale = is_token[:, None] & (offs_g * SCALE_GROUP < D)[None, :]
        scale_ptrs = scale_ptr + page_row * SCALE_ROW + (rows[:, None] * SCALE_ROW + SCALE_START + offs_g[None, :])
        scales = tl.load(scale_ptrs, mask=is_scale, other=0.0)
        grouped = tl.reshape(latents.to(tl.float32), (BLOCK_N, GROUPS, SCALE_GROUP)) * scales[:, :, None]
        latents = tl.reshape(grouped, (BLOCK_N, BLOCK_D))
    return latents.to(OPERAND)


@triton.jit(do_not_specialize=["block_table_stride", "num_rows"])
def _mla_decode_kernel(
    query_ptr,
    query_row_stride,
    query_head_stride,
    latent_ptr,
    scale_ptr,
    rope_ptr,
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
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    ROPE_START: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    SCALE_START: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OVERHEAD: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    if IS_DEPENDENT:
        wait_for_earlier()
    # Blocks of heads follow each other, so that those of one range read its pages at the same time.
    first_head = tl.program_id(0) * BLOCK_H
    program = tl.program_id(1)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_R)
    first_row, end_row = rows_of_program(program, num_rows, first_rows_ptr, NUM_SPLITS)
    for row_index in range(first_row, end_row):
        row = tl.cast(row_index, tl.int64)
        context_len = tl.load(context_lens_ptr + row)
        first_page, end_page, slot = split_of(
            program, row_index, context_len, row_starts_ptr, range_pages_ptr, PAGE_SIZE, NUM_SPLITS, OVERHEAD
        )
        if first_page < end_page:
            # No slot is negative. Heads that seem to depend on it keep the compiler from computing all addresses
            # of queries and partials before the loop over rows, where they would take the accumulator's registers.
            offs_h = first_head + tl.minimum(slot, 0) + tl.arange(0, BLOCK_H)
            is_head = offs_h < H
            is_latent_place = is_head[:, None] & (offs_d < D)[None, :]
            is_rope_place = is_head[:, None] & (offs_r < R)[None, :]
            query_ptrs = query_ptr + row * query_row_stride + offs_h[:, None] * query_head_stride
            query = tl.load(query_ptrs + offs_d[None, :], mask=is_latent_place, other=0.0).to(OPERAND)
            query_pe = tl.load(query_ptrs + D + offs_r[None, :], mask=is_rope_place, other=0.0).to(OPERAND)
            table_ptr = block_table_ptr + row * block_table_stride
            first_token = first_page * PAGE_SIZE
            end_token = tl.minimum(end_page * PAGE_SIZE, context_len)
            highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
            weight_sum = tl.zeros((BLOCK_H,), tl.float32)
            acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
            page = tl.load(table_ptr + first_page)
            for token in range(first_token, end_token, BLOCK_N):
                page_row = page.to(tl.int64) * PAGE_SIZE
                rows = token % PAGE_SIZE + offs_n
                # One tile ahead, so that the next tile's load need not wait for its page.
                next_token = token + BLOCK_N
                page = tl.load(table_ptr + next_token // PAGE_SIZE, mask=next_token < end_token, other=0)
                is_token = token + offs_n < end_token
                latents = _load_latents(
                    latent_ptr, scale_ptr, page_row, rows, is_token, D, LATENT_ROW, SCALE_ROW, SCALE_START, SCALE_GROUP,
                    OPERAND, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                is_rope = is_token[:, None] & (offs_r < R)[None, :]
                rope_ptrs = rope_ptr + page_row * ROPE_ROW + (rows[:, None] * ROPE_ROW + ROPE_START + offs_r[None, :])
                key_pe = tl.load(rope_ptrs, mask=is_rope, other=0.0).to(OPERAND)
                scores = tl.dot(query, tl.trans(latents), input_precision="ieee")
                scores = tl.dot(query_pe, tl.trans(key_pe), scores, input_precision="ieee")
                scores = tl.where(is_token[None, :], scores * score_scale, float("-inf"))
                # Every tile has a token, so `new_highest` is finite.
                new_highest = tl.maximum(highest, tl.max(scores, axis=1))
                weights = tl.exp2(scores - new_highest[:, None])
                correction = tl.exp2(highest - new_highest)
                weight_sum = weight_sum * correction + tl.sum(weights, axis=1)
                acc = tl.dot(weights.to(OPERAND), latents, acc * correction[:, None], input_precision="ieee")
                highest = new_highest
            slot_head = slot.to(tl.int64) * H + offs_h
            tl.store(lse_ptr + slot_head, highest + tl.log2(weight_sum), mask=is_head)
            partial_ptrs = partial_ptr + slot_head[:, None] * D + offs_d[None, :]
            tl.store(partial_ptrs, acc * (1.0 / weight_sum)[:, None], mask=is_latent_place)
