"""Copying pages of 64 latents out of a cache and back, beside torch's indexing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels.page_copy import gather_pages, scatter_pages
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls

PAGE = (64, 576)
_PAGE_BYTES = 2.0 * PAGE[0] * PAGE[1]
# 2.4 GB: more than an L2 cache holds of the pages that one call after the other names.
_NUM_PAGES = 32768
_CALLS = 16

Copy = Callable[[Tensor, Tensor, Tensor], object]


def cases() -> list[BenchCase]:
    """The pages of 4k and of 64k tokens."""
    return [_case(name, num_pages) for name in ("gather", "scatter") for num_pages in (64, 1024)]


def _case(name: str, num_pages: int) -> BenchCase:
    ours, peer = {"gather": (_gather, _torch_gather), "scatter": (_scatter, _torch_scatter)}[name]
    return BenchCase(
        family="page_copy",
        shape=f"{name} {num_pages} pages of {PAGE[0]}x{PAGE[1]} bf16",
        calls=_calls(ours, num_pages),
        bytes_moved=2 * _PAGE_BYTES * num_pages,
        peers={"torch": _calls(peer, num_pages)},
    )


def _calls(copy: Copy, num_pages: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        cache = torch.randn(_NUM_PAGES, *PAGE, dtype=torch.bfloat16, device="cuda")
        ids = torch.randperm(_NUM_PAGES, device="cuda")[: _CALLS * num_pages].view(_CALLS, num_pages)
        pages = torch.randn(_CALLS, num_pages, *PAGE, dtype=torch.bfloat16, device="cuda")
        return [partial(copy, cache, pages[i], ids[i]) for i in range(_CALLS)]

    return make


def _gather(cache: Tensor, _: Tensor, ids: Tensor) -> object:
    return gather_pages(cache, ids)


def _torch_gather(cache: Tensor, _: Tensor, ids: Tensor) -> object:
    return cache.index_select(0, ids)


def _scatter(cache: Tensor, pages: Tensor, ids: Tensor) -> object:
    return scatter_pages(pages, cache, ids)


def _torch_scatter(cache: Tensor, pages: Tensor, ids: Tensor) -> object:
    return cache.index_copy_(0, ids, pages)
