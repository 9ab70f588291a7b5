"""The plan of splits against its specification, and what every plan must be."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.split_plan import plan_splits, plan_splits_ref

BATCHES = [[1], [0], [0, 0, 4096, 0], [64, 65, 63, 1], [9000, 3, 0, 70, 20000], [], [500] * 300]


@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: f"{len(lengths)} rows")
@pytest.mark.parametrize("num_programs", [1, 3, 40])
def test_equals_the_specification(lengths, num_programs, device):
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    found = plan_splits(context_lens, 64, num_programs=num_programs)
    expected = plan_splits_ref(context_lens, 64, num_programs=num_programs)
    assert torch.equal(found.row_starts, expected.row_starts)
    assert torch.equal(found.first_rows, expected.first_rows)
    assert torch.equal(found.range_pages, expected.range_pages)


def test_programs_get_equal_parts_of_a_long_batch(device):
    """Ranges of pages and overheads together are equal but for the last, whatever the lengths."""
    lengths = torch.tensor([40000, 64, 9000, 128, 30000], dtype=torch.int32, device=device)
    plan = plan_splits(lengths, 64, num_programs=7)
    line = int(-(-lengths // 64).sum()) + 5 * plan.overhead_pages
    assert plan.row_starts[-1] == line
    assert plan.range_pages[0] == -(-line // 7)


def test_a_short_batch_is_not_cut_small(device):
    plan = plan_splits(torch.tensor([320], dtype=torch.int32, device=device), 64, num_programs=100)
    assert plan.range_pages[0] == plan.overhead_pages + 1
    assert plan.first_rows.tolist() == [0] * 3 + [1] * 98


@pytest.mark.parametrize(
    ("context_lens", "page_size", "num_programs"),
    [
        (torch.zeros(2, dtype=torch.int64), 64, 4),
        (torch.zeros(2, 1, dtype=torch.int32), 64, 4),
        (torch.zeros(2, dtype=torch.int32), 0, 4),
        (torch.zeros(2, dtype=torch.int32), 64, 0),
    ],
)
def test_refuses_what_does_not_fit(context_lens, page_size, num_programs):
    with pytest.raises(ValueError, match=r"is not|must be positive"):
        plan_splits(context_lens, page_size, num_programs=num_programs)
