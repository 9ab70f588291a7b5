"""Where the tokens of paged sequences lie.

Shapes: B sequences, L slots of the longest sequence. Attention over pages gathers a sequence's rows by their slots;
this plans the gather once a step, so that all layers share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A CPU's matrix library compiles a program for each new shape; see linear.py.
_ROUNDING = 32


def paged_slots(block_table: Tensor, context_lens: Tensor, page_size: int) -> Tensor:
    """Return the slot of every token of every sequence, in order.

    Args:
        block_table: [B, max_pages] int32; entries past a sequence's pages are not read.
        context_lens: [B] int32, each at least 1 and at most max_pages * page_size.
        page_size: tokens a page holds.

    Returns:
        [B, L] int64, L the longest context, rounded up so that few shapes occur. Places past a sequence's end repeat
        its last token's slot, so that a gather never reads a slot that holds nothing.

    Raises:
        ValueError: the shapes do not fit.
    """
    if block_table.ndim != 2 or context_lens.shape != block_table.shape[:1]:
        raise ValueError(
            f"block_table {tuple(block_table.shape)} and context_lens {tuple(context_lens.shape)} "
            "do not fit [B, max_pages], [B]"
        )
    longest = -(-int(context_lens.max()) // _ROUNDING) * _ROUNDING if len(context_lens) else 0
    tokens = torch.arange(longest, device=block_table.device)
    tokens = torch.minimum(tokens[None], (context_lens.long() - 1)[:, None])
    page_ids = block_table.gather(1, tokens // page_size)
    return page_ids.long() * page_size + tokens % page_size
