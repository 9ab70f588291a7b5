"""`headrace_kernels.page_copy` in Triton: one program for 16 KiB of a page, one launch for all pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.launch import launch

_BLOCK_BYTES = 16384
# Pages are copied as integers: their values mean nothing here, and one kernel serves every dtype of that size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_pages(cache: Tensor, page_ids: Tensor) -> Tensor:
    """See `headrace_kernels.page_copy.gather_pages`."""
    pages = torch.empty((len(page_ids), *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
    _launch(_gather_kernel, cache, pages, page_ids)
    return pages


def scatter_pages(pages: Tensor, cache: Tensor, page_ids: Tensor) -> None:
    """See `headrace_kernels.page_copy.scatter_pages`."""
    _launch(_scatter_kernel, cache, pages, page_ids)


def _launch(kernel: Any, cache: Tensor, pages: Tensor, page_ids: Tensor) -> None:
    integers = _INTEGERS[cache.element_size()]
    page_size = cache.shape[1:].numel()
    block = _BLOCK_BYTES // cache.element_size()
    launch(
        kernel,
        (len(page_ids), triton.cdiv(page_size, block)),
        *(cache.view(integers), cache.stride(0), pages.view(integers), pages.stride(0), page_ids, page_size),
        BLOCK_N=block,
        num_warps=8,
    )


@triton.jit
def _gather_kernel(cache_ptr, cache_stride, pages_ptr, pages_stride, ids_ptr, page_size, BLOCK_N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    page_id = tl.load(ids_ptr + i).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_inside = n < page_size
    # The page of id -1 is not read, and comes out as zeros.
    part = tl.load(cache_ptr + page_id * cache_stride + n, mask=is_inside & (page_id >= 0), other=0)
    tl.store(pages_ptr + i * pages_stride + n, part, mask=is_inside)


@triton.jit
def _scatter_kernel(cache_ptr, cache_stride, pages_ptr, pages_stride, ids_ptr, page_size, BLOCK_N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    page_id = tl.load(ids_ptr + i).to(tl.int64)
    if page_id >= 0:
        n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_inside = n < page_size
        part = tl.load(pages_ptr + i * pages_stride + n, mask=is_inside)
        tl.store(cache_ptr + page_id * cache_stride + n, part, mask=is_inside)
