"""`headrace_kernels.mla_prologue` in Triton: one launch of two kinds of programs.

The first B programs make a row each: they store its latent and rotate its queries. The others multiply: each holds a
tile of W_UK of one head, read once, and takes the queries of all rows past it. The product is computed transposed, so
that the columns of W_UK and not the few rows fill the matrix unit's 64, and in tiles that do not depend on B, so that
a row's bits do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu import configs
from headrace_kernels.gpu.dependent_launch import dependent_launch, prefetch_rows, wait_for_earlier
from headrace_kernels.gpu.latent_rows import norm_rope_store, row_arguments, row_constants
from headrace_kernels.gpu.launch import launch, operand_dtype
from headrace_kernels.gpu.rope import rotate

_BLOCK_HEADS = 32


def default_config(num_heads: int, dtype: torch.dtype) -> configs.Config:
    """Return tiles that give each of an H200's 132 multiprocessors a program: narrow ones for few heads.

    Float32 has no matrix unit: there a tile of 128 x 64 weights would not fit the registers.
    """
    if dtype == torch.float32:
        return {"BLOCK_B": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_B": 32, "BLOCK_D": 64 if num_heads <= 32 else 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}


def config_key(num_heads: int, dtype: torch.dtype) -> str:
    """Return the key of a configuration: never the number of rows, which the tiles must not depend on."""
    return f"H={num_heads} {str(dtype).removeprefix('torch.')}"


def mla_prologue(
    query: Tensor,
    w_uk: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float,
    is_interleaved: bool,
) -> Tensor:
    """See `headrace_kernels.mla_prologue.mla_prologue`."""
    num_rows, num_heads, _ = query.shape
    _, nope_dim, latent_dim = w_uk.shape
    out = torch.empty((num_rows, num_heads, latent_dim + k_pe.shape[1]), dtype=query.dtype, device=query.device)
    key, default = config_key(num_heads, query.dtype), default_config(num_heads, query.dtype)
    tiles = configs.config("mla_prologue", key, default, query)
    num_tiles = triton.cdiv(latent_dim, tiles["BLOCK_D"])
    launch(
        _mla_prologue_kernel,
        (num_rows + num_heads * num_tiles if num_rows else 0,),
        *(query, query.stride(0), query.stride(1), w_uk, w_uk.stride(0), w_uk.stride(1), out),
        *(num_rows, num_heads, num_tiles),
        row_arguments(c_kv, k_pe, norm_weight, cos, sin, cache, slot_mapping),
        eps,
        NOPE_DIM=nope_dim,
        BLOCK_H=min(triton.next_power_of_2(max(num_heads, 1)), _BLOCK_HEADS),
        OPERAND=operand_dtype(query),
        **dependent_launch(query),
        **tiles,
        **row_constants(c_kv, k_pe, is_interleaved=is_interleaved),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _mla_prologue_kernel(
    query_ptr,
    query_row_stride,
    query_head_stride,
    w_ptr,
    w_head_stride,
    w_row_stride,
    out_ptr,
    num_rows,
    num_heads,
    num_tiles,
    row,
    eps,
    NOPE_DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    latent_dim, half = row[14:]
    if IS_DEPENDENT:
        if program >= num_rows:
            tile = program - num_rows
            k = tl.minimum(tl.arange(0, BLOCK_K), NOPE_DIM - 1)
            first = tile % num_tiles * BLOCK_D
            tile_ptr = w_ptr + (tile // num_tiles).to(tl.int64) * w_head_stride + first
            LINES: tl.constexpr = max(BLOCK_D * w_ptr.dtype.element_ty.primitive_bitwidth // 1024, 1)
            prefetch_rows(tile_ptr + k * w_row_stride, latent_dim - first, LINES)
        wait_for_earlier()
    out_head_stride = latent_dim + 2 * half
    if program < num_rows:
        token = program.to(tl.int64)
        norm_rope_store(token, row, eps, IS_INTERLEAVED, NUM_GROUPS, BLOCK_R, IS_INTERPRETED)
        pe_ptr = query_ptr + token * query_row_stride + NOPE_DIM
        out_row_ptr = out_ptr + token * num_heads * out_head_stride + latent_dim
        _rotate_queries(
            pe_ptr,
            query_head_stride,
            out_row_ptr,
            out_head_stride,
            num_heads,
            token,
            row,
            BLOCK_H,
            BLOCK_R,
            IS_INTERLEAVED,
        )
    else:
        tile = program - num_rows
        head = (tile // num_tiles).to(tl.int64)
        d = (tile % num_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
        is_latent = d < latent_dim
        w_ptr += head * w_head_stride
        query_ptr += head * query_head_stride
        out_ptr += head * out_head_stride
        w = _load(w_ptr, w_row_stride, 0, NOPE_DIM, d, is_latent, BLOCK_K, OPERAND)
        for first in range(0, num_rows, BLOCK_B):
            b = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
            is_row = b < num_rows
            query = _load(query_ptr, 1, 0, NOPE_DIM, b * query_row_stride, is_row, BLOCK_K, OPERAND)
            product = tl.dot(tl.trans(w), query, input_precision="ieee")
            # Nothing is left for it where the tile is as long as a head is wide.
            for k in range(BLOCK_K, NOPE_DIM, BLOCK_K):
                more = _load(w_ptr, w_row_stride, k, NOPE_DIM, d, is_latent, BLOCK_K, OPERAND)
                query = _load(query_ptr, 1, k, NOPE_DIM, b * query_row_stride, is_row, BLOCK_K, OPERAND)
                product = tl.dot(tl.trans(more), query, product, input_precision="ieee")
            out_ptrs = out_ptr + (b * num_heads * out_head_stride)[:, None] + d[None, :]
            absorbed = tl.trans(product).to(out_ptr.dtype.element_ty)
            tl.store(out_ptrs, absorbed, mask=is_row[:, None] & is_latent[None, :])


@triton.jit
def _load(ptr, k_stride, first, end, offsets, is_inside, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr):
    """Return [BLOCK_K, N]: what lies `offsets` [N] past rows `first` to `end`; zeros outside."""
    k = first + tl.arange(0, BLOCK_K)
    ptrs = ptr + k[:, None] * k_stride + offsets[None, :]
    return tl.load(ptrs, mask=(k < end)[:, None] & is_inside[None, :], other=0.0).to(OPERAND)


@triton.jit
def _rotate_queries(
    pe_ptr,
    head_stride,
    out_ptr,
    out_head_stride,
    num_heads,
    token,
    row,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """Rotate the rope columns, from `pe_ptr` on, of all heads of a row; padding's too."""
    cos_ptr, sin_ptr = row[5:7]
    half = row[15]
    pair = tl.arange(0, BLOCK_R)
    is_pair = pair < half
    cos = tl.load(cos_ptr + token * half + pair, mask=is_pair, other=0.0)
    sin = tl.load(sin_ptr + token * half + pair, mask=is_pair, other=0.0)
    for first in range(0, num_heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        is_head = head < num_heads
        halves = rotate(pe_ptr + head * head_stride, 1, is_head, cos, sin, half, BLOCK_R, IS_INTERLEAVED)
        out_ptrs = out_ptr + (head * out_head_stride)[:, None] + pair[None, :]
        is_written = is_head[:, None] & is_pair[None, :]
        tl.store(out_ptrs, halves[0].to(out_ptr.dtype.element_ty), mask=is_written)
        tl.store(out_ptrs + half, halves[1].to(out_ptr.dtype.element_ty), mask=is_written)
