"""Sorting assignments on the device against its specification."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.expert_blocks import bounds
from headrace_kernels.moe_sort import sort_blocks, sort_blocks_ref

NAMES = ("assignment", "block_expert", "num_blocks", "counts")


def assert_equals_the_specification(experts, num_experts, block_size, first_local, num_local):
    found = sort_blocks(experts, num_experts, block_size, first_local=first_local, num_local=num_local)
    expected = sort_blocks_ref(experts, num_experts, block_size, first_local=first_local, num_local=num_local)
    for name in NAMES:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.block_size, found.num_assignments) == (block_size, experts.numel())
    assert len(found.block_expert) >= int(found.num_blocks)


@pytest.mark.parametrize(
    ("shape", "num_experts", "block_size"),
    [
        ((7, 3), 5, 4),
        ((1, 2), 5, 16),
        ((0, 2), 3, 4),
        ((5, 1), 1, 2),
        ((9, 2), 16, 1),
        ((600, 2), 3, 64),
        ((2100, 2), 3, 64),
    ],
)
def test_equals_the_specification(shape, num_experts, block_size, device):
    experts = torch.randint(num_experts, shape, device=device)
    assert_equals_the_specification(experts, num_experts, block_size, 0, num_experts)


@pytest.mark.parametrize(("first", "num"), [(0, 2), (3, 4), (9, 1), (4, 0)])
def test_experts_elsewhere_and_experts_that_are_none_have_no_row(first, num, device):
    experts = torch.randint(-1, 11, (13, 3), dtype=torch.int32, device=device)
    assert_equals_the_specification(experts, 10, 4, first, num)


def test_the_worst_case_fills_the_bounds(device):
    """Every expert hit once, but one that takes the rest: as many blocks as `bounds` allows."""
    experts = torch.tensor([[0], [1], [2], [3], [0], [0], [0], [0]], device=device)
    blocks = sort_blocks(experts, 4, 4)
    assert int(blocks.num_blocks) == len(blocks.block_expert) == bounds(8, 4, 4)[1] == 5


def test_a_wider_tensor_s_columns(device):
    experts = torch.randint(6, (5, 4), device=device)[:, 1:3]
    assert_equals_the_specification(experts, 6, 2, 0, 6)


@pytest.mark.parametrize(
    ("block_size", "first", "num", "dtype"),
    [(0, 0, 4, torch.int64), (4, 2, 3, torch.int64), (4, -1, 2, torch.int64), (4, 0, 4, torch.float32)],
)
def test_what_does_not_fit_is_refused(block_size, first, num, dtype, device):
    experts = torch.zeros(2, 2, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="experts"):
        sort_blocks(experts, 4, block_size, first_local=first, num_local=num)
