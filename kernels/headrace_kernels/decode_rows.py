"""What attention of decode rows over pages asks of its arguments, latents or keys and values alike."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.split_ranges import SplitPlan

_SMALLEST_TILE = 16


def check_paged_rows(
    num_rows: int,
    page_size: int,
    block_table: Tensor,
    context_lens: Tensor,
    plan: SplitPlan | None,
    num_splits: int | None,
) -> None:
    """Check what says where the contexts of `num_rows` rows lie and how they are split.

    Raises:
        ValueError: `block_table` is not [num_rows, max_pages] int32 or `context_lens` not [num_rows] int32; there are
            both a plan and a number of splits; the plan is for other rows or pages; `num_splits` is not positive.
    """
    is_table = block_table.ndim == 2 and block_table.shape[0] == num_rows and block_table.dtype == torch.int32
    if not is_table or context_lens.shape != (num_rows,) or context_lens.dtype != torch.int32:
        raise ValueError(
            f"block_table {tuple(block_table.shape)} {block_table.dtype} and "
            f"context_lens {tuple(context_lens.shape)} {context_lens.dtype} "
            f"are not [B, max_pages] int32 and [B] int32 with B {num_rows}"
        )
    if plan is not None and num_splits is not None:
        raise ValueError("there can be a plan or a number of splits, not both")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits {num_splits} must be positive")
    if plan is not None and (plan.num_rows != num_rows or plan.page_size != page_size):
        raise ValueError(
            f"a plan for {plan.num_rows} rows and pages of {plan.page_size} tokens does not fit "
            f"{num_rows} rows and pages of {page_size}"
        )


def check_page_tiles(page_size: int) -> None:
    """Check that tiles which a matrix unit can take divide a page.

    Raises:
        ValueError: `page_size` is not a positive multiple of 16.
    """
    if page_size < 1 or page_size % _SMALLEST_TILE:
        raise ValueError(f"page_size {page_size} is not a multiple of {_SMALLEST_TILE}, as a GPU's kernel needs")
