"""Batches of decode rows for the tests of decode attention: NaN in everything that must not be read."""

from __future__ import annotations

import torch

NO_PAGE = 2**30
"""A page far outside every cache."""


def batch_of(lengths, page_size, fill_page, device):
    """Return a block table and context lengths of `lengths`, pages in no order; entries past a context are no pages.

    `fill_page(page, used)` is called for every page of a context with the number of its slots in use.
    """
    num_pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(num_pages) + 1).tolist()
    table = torch.full((len(lengths), max(num_pages, default=0) + 1), NO_PAGE, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for index in range(num_pages[b]):
            table[b, index] = order.pop()
            fill_page(int(table[b, index]), min(page_size, length - index * page_size))
    return table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def num_pages_of(lengths, page_size):
    """Return how many pages a cache for `batch_of` needs: one more than the contexts fill."""
    return sum(-(-length // page_size) for length in lengths) + 1
