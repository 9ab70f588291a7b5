"""Assignments of tokens to experts, in blocks of one expert each: what sorting yields and products by blocks take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """Assignments in the order of their experts, each expert's padded to whole blocks of `block_size` rows.

    `assignment` [rows] int64: which assignment each row is; T * K marks padding. `block_expert` [blocks] int32: the
    expert of each block. `expert_rows`: each expert's rows, padding included, on the host, because a CPU loops over
    experts.
    """

    assignment: Tensor
    block_expert: Tensor
    block_size: int
    expert_rows: list[int]
    num_assignments: int


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """As `ExpertBlocks`, but nothing is known on the host: tensors have their largest sizes, which `bounds` gives.

    `assignment` [max_rows] int32: which assignment each row is; T * K marks padding, also past the last block.
    `block_expert` [max_blocks] int32: the expert of each block, counted from the first local one; -1 past the last.
    `num_blocks` [1] int32. `counts` [E] int32: the assignments of every expert, local or not.
    """

    assignment: Tensor
    block_expert: Tensor
    num_blocks: Tensor
    counts: Tensor
    block_size: int
    num_assignments: int


def bounds(num_assignments: int, num_local: int, block_size: int) -> tuple[int, int]:
    """Return the largest numbers of rows and blocks that `num_assignments` to `num_local` experts can come to.

    An expert with c assignments has ceil(c / block_size) <= 1 + (c - 1) / block_size blocks. Summed over h experts hit:
    h + (num_assignments - h) / block_size, which grows with h; and h <= min(num_assignments, num_local).
    """
    most_hit = min(num_assignments, num_local)
    max_blocks = most_hit + (num_assignments - most_hit) // block_size if most_hit else 0
    return max_blocks * block_size, max_blocks


def empty_blocks(num_assignments: int, num_experts: int, num_local: int, block_size: int, like: Tensor) -> DeviceBlocks:
    """Return blocks with tensors of the largest sizes, not filled, on the device of `like`."""
    max_rows, max_blocks = bounds(num_assignments, num_local, block_size)
    tensors = (like.new_empty(size, dtype=torch.int32) for size in (max_rows, max_blocks, 1, num_experts))
    return DeviceBlocks(*tensors, block_size=block_size, num_assignments=num_assignments)
