"""`headrace_kernels.page_copy` in plain torch."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.page_copy import gather_pages_ref, scatter_pages_ref


def gather_pages(cache: Tensor, page_ids: Tensor) -> Tensor:
    """See `headrace_kernels.page_copy.gather_pages`."""
    if len(page_ids) and int(page_ids.min()) < 0:
        return gather_pages_ref(cache, page_ids)
    return cache.index_select(0, page_ids)


def scatter_pages(pages: Tensor, cache: Tensor, page_ids: Tensor) -> None:
    """See `headrace_kernels.page_copy.scatter_pages`."""
    if len(page_ids) and int(page_ids.min()) < 0:
        scatter_pages_ref(pages, cache, page_ids)
    else:
        cache.index_copy_(0, page_ids.long(), pages)
