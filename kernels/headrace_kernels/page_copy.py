"""Copy whole pages out of a cache into one contiguous run, and back: what a transfer sends and receives.

Shapes: P pages in the cache, n pages to copy; a page is anything contiguous of any dtype.
Bytes moved: 2 * n * bytes of a page, so the kernel is bound by memory bandwidth.

`gather_pages` and `scatter_pages` are the entries; `gather_pages_ref` and `scatter_pages_ref` are the specifications
they are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select


def gather_pages(cache: Tensor, page_ids: Tensor) -> Tensor:
    """Return the pages `page_ids` of `cache`, one after the other.

    Args:
        cache: [P, ...page], any dtype; each page contiguous, perhaps with something between two of them.
        page_ids: [n] int32 or int64; each value in [-1, P); -1 stands for a page of zeros.

    Returns:
        [n, ...page], dtype of `cache`, contiguous.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    _check(cache, page_ids)
    return select("page_copy", cache).gather_pages(cache, page_ids)


def scatter_pages(pages: Tensor, cache: Tensor, page_ids: Tensor) -> None:
    """Copy `pages[i]` to `cache[page_ids[i]]` for every i whose page id is not -1.

    Args:
        pages: [n, ...page], dtype of `cache`; each page contiguous.
        cache: [P, ...page], any dtype; each page contiguous, perhaps with something between; written in place.
        page_ids: [n] int32 or int64; each value in [-1, P); values other than -1 are distinct.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    _check(cache, page_ids)
    if pages.shape != (len(page_ids), *cache.shape[1:]) or pages.dtype != cache.dtype or not _has_whole_pages(pages):
        raise ValueError(
            f"pages {tuple(pages.shape)} {pages.dtype} with strides {pages.stride()} are not {len(page_ids)} "
            f"contiguous pages {tuple(cache.shape[1:])} {cache.dtype}"
        )
    select("page_copy", cache).scatter_pages(pages, cache, page_ids)


def gather_pages_ref(cache: Tensor, page_ids: Tensor) -> Tensor:
    """Specification of `gather_pages` in plain torch."""
    pages = torch.zeros((len(page_ids), *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
    for i, page_id in enumerate(page_ids.tolist()):
        if page_id >= 0:
            pages[i] = cache[page_id]
    return pages


def scatter_pages_ref(pages: Tensor, cache: Tensor, page_ids: Tensor) -> None:
    """Specification of `scatter_pages` in plain torch."""
    for page, page_id in zip(pages, page_ids.tolist(), strict=True):
        if page_id >= 0:
            cache[page_id] = page


def _check(cache: Tensor, page_ids: Tensor) -> None:
    if page_ids.ndim != 1 or page_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"page_ids {tuple(page_ids.shape)} {page_ids.dtype} must be [n] int32 or int64")
    if cache.ndim < 2 or not _has_whole_pages(cache):
        raise ValueError(f"cache {tuple(cache.shape)} with strides {cache.stride()} must hold contiguous pages")


def _has_whole_pages(pages: Tensor) -> bool:
    """Say whether each page of `pages` is contiguous."""
    width = 1
    for size, stride in zip(reversed(pages.shape[1:]), reversed(pages.stride()[1:]), strict=True):
        if size != 1 and stride != width:
            return False
        width *= size
    return True
