"""`headrace_kernels.rope` in Triton: one program some heads of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.launch import launch

_TILE = 2048


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """See `headrace_kernels.rope.rope`."""
    num_tokens, num_heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_pairs = triton.next_power_of_2(max(width // 2, 1))
    block_heads = min(triton.next_power_of_2(max(num_heads, 1)), max(_TILE // (2 * block_pairs), 1))
    launch(
        _rope_kernel,
        (num_tokens, triton.cdiv(num_heads, block_heads)),
        *(x, *x.stride(), cos.contiguous(), sin.contiguous(), out, num_heads, width // 2),
        IS_INTERLEAVED=is_interleaved,
        BLOCK_H=block_heads,
        BLOCK_R=block_pairs,
        num_warps=min(max(block_heads * block_pairs // 256, 1), 4),
    )
    return out


@triton.jit
def rotate(
    x_ptrs, column_stride, is_head, cos, sin, half, BLOCK_R: tl.constexpr, IS_INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the halves, float32 [BLOCK_H, BLOCK_R], of the rotated heads that start at `x_ptrs` [BLOCK_H].

    Heads that are not `is_head` [BLOCK_H] and pairs from `half` on are not read. `cos` and `sin` are [BLOCK_R].
    """
    pair = tl.arange(0, BLOCK_R)
    is_read = is_head[:, None] & (pair < half)[None, :]
    if IS_INTERLEAVED:
        # Read side by side and split in registers, so that the loads are wide.
        column = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        ptrs = x_ptrs[:, None, None] + column[None, :, :] * column_stride
        first, second = tl.split(tl.load(ptrs, mask=is_read[:, :, None], other=0.0).to(tl.float32))
    else:
        ptrs = x_ptrs[:, None] + pair[None, :] * column_stride
        first = tl.load(ptrs, mask=is_read, other=0.0).to(tl.float32)
        second = tl.load(ptrs + half * column_stride, mask=is_read, other=0.0).to(tl.float32)
    cos, sin = cos[None, :], sin[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_kernel(
    x_ptr,
    token_stride,
    head_stride,
    column_stride,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_heads,
    half,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = head < num_heads
    pair = tl.arange(0, BLOCK_R)
    is_pair = pair < half
    cos = tl.load(cos_ptr + token * half + pair, mask=is_pair, other=0.0)
    sin = tl.load(sin_ptr + token * half + pair, mask=is_pair, other=0.0)
    x_ptrs = x_ptr + token * token_stride + head * head_stride
    halves = rotate(x_ptrs, column_stride, is_head, cos, sin, half, BLOCK_R, IS_INTERLEAVED)
    out_ptrs = out_ptr + ((token * num_heads + head) * 2 * half)[:, None] + pair[None, :]
    is_written = is_head[:, None] & is_pair[None, :]
    tl.store(out_ptrs, halves[0].to(out_ptr.dtype.element_ty), mask=is_written)
    tl.store(out_ptrs + half, halves[1].to(out_ptr.dtype.element_ty), mask=is_written)
