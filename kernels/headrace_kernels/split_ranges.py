"""The ranges of pages that programs share in decode attention: what a plan is, and how long a range is at least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

OVERHEAD_TOKENS = 64
"""What starting a row costs a program, in tokens of context: an estimate, by bytes.

16 heads' queries are 18 KiB and their partial results 32 KiB; 64 tokens of bfloat16 latents are 72 KiB.
"""


MIN_TOKENS = 64
"""The shortest range, in tokens: what reading a split's partial results costs again. An estimate, as the overhead."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The ranges of one step's batch.

    `row_starts` [B + 1] int32: where each row begins on the line of pages; the last is the line's length.
    `first_rows` [N + 1] int32: the row in which each program's range begins; B where it is empty, and at the end.
    `range_pages` [1] int32: the length of a range.
    """

    row_starts: Tensor
    first_rows: Tensor
    range_pages: Tensor
    page_size: int
    overhead_pages: int

    @property
    def num_rows(self) -> int:
        """B."""
        return self.row_starts.shape[0] - 1

    @property
    def num_programs(self) -> int:
        """N."""
        return self.first_rows.shape[0] - 1


def range_constants(page_size: int) -> tuple[int, int]:
    """Return a row's overhead and the shortest range, both in pages, for pages of `page_size` tokens."""
    overhead_pages = -(-OVERHEAD_TOKENS // page_size)
    return overhead_pages, overhead_pages + -(-MIN_TOKENS // page_size)
