"""How a batch of decode rows of different lengths is divided among programs, decided where the lengths are.

Shapes: B rows, N programs. Attention of a decode row reads its pages once, so the work is a line of pages: row 0's,
then row 1's, and so on, each row preceded by `overhead_pages`, what starting a row costs. The line is cut into N equal
ranges, none shorter than a row of `MIN_TOKENS`; program n computes range n, whatever rows that touches. A row that is
cut has several *splits*, combined afterwards by their log-sum-exp. A row without context takes no place.

Split (n, b) of program n and row b has slot n + b among the partial results: along the line n or b grows with every
split, so no two share a slot, N + B slots suffice, and a row's splits lie side by side.

`plan_splits` is the entry; `plan_splits_ref` is the specification it is tested against. It reads 4 * B bytes and is
bound by the latency of its launch: a step plans once for all its layers. A plan's tensors have fixed shapes and no
value of them is read on the host, so a CUDA graph may hold the planning and what follows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.split_ranges import SplitPlan, range_constants


def plan_splits(context_lens: Tensor, page_size: int, *, num_programs: int) -> SplitPlan:
    """Return how `num_programs` programs share the pages of a batch in about equal parts.

    Args:
        context_lens: [B] int32, each at least 0.
        page_size: tokens a page holds.
        num_programs: N.

    Raises:
        ValueError: a shape or dtype does not fit, or a number is not positive.
    """
    if context_lens.ndim != 1 or context_lens.dtype != torch.int32:
        raise ValueError(f"context_lens {tuple(context_lens.shape)} {context_lens.dtype} is not [B] int32")
    if page_size < 1 or num_programs < 1:
        raise ValueError(f"page_size {page_size} and num_programs {num_programs} must be positive")
    return select("split_plan", context_lens).plan_splits(context_lens, page_size, num_programs=num_programs)


def plan_splits_ref(context_lens: Tensor, page_size: int, *, num_programs: int) -> SplitPlan:
    """Specification of `plan_splits` in plain torch."""
    overhead_pages, min_range = range_constants(page_size)
    pages = (context_lens + page_size - 1) // page_size
    row_ends = torch.cumsum(torch.where(pages > 0, pages + overhead_pages, 0), dim=0)
    row_starts = torch.cat((row_ends.new_zeros(1), row_ends))
    range_pages = ((row_starts[-1:] + num_programs - 1) // num_programs).clamp_min(min_range)
    range_starts = torch.arange(num_programs + 1, device=context_lens.device) * range_pages
    first_rows = torch.searchsorted(row_ends, range_starts, right=True)
    tensors = (tensor.to(torch.int32) for tensor in (row_starts, first_rows, range_pages))
    return SplitPlan(*tensors, page_size=page_size, overhead_pages=overhead_pages)
