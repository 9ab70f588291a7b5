"""Bring tokens into the order of their experts, and cut that order into blocks of one expert each.

Shapes: T tokens, K experts per token, E experts. An assignment is a pair (token, k), numbered `token * K + k`.
First two of the three steps of a mixture-of-experts layer; the third is `grouped_gemm`.

`moe_sort` and `prepare_blocks` are the entries and their own specifications.
Source: vllm-project/vllm, moe_align_block_size, whose result this is, in two visible steps.
"""

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


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the assignments by expert; within an expert by token.

    Args:
        experts: [T, K] int64, each in [0, E).
        num_experts: E.

    Returns:
        The assignments in order, [T * K] int64, and each expert's number of them, [E] int64.
    """
    flat = experts.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)


def prepare_blocks(order: Tensor, counts: Tensor, block_size: int) -> ExpertBlocks:
    """Pad each expert's assignments to whole blocks; an expert without any has no block.

    Synchronises with the device once, to bring `counts` to the host.

    Args:
        order: [T * K] int64, from `moe_sort`.
        counts: [E] int64, from `moe_sort`.
        block_size: rows of a block, at least 1; 1 pads nothing.
    """
    num_blocks = counts if block_size == 1 else (counts + block_size - 1) // block_size
    block_expert = torch.repeat_interleave(num_blocks)
    total = len(order)
    if block_size == 1:
        return ExpertBlocks(order, block_expert.int(), 1, counts.tolist(), total)
    padded = num_blocks * block_size
    gaps = padded.cumsum(0) - padded - (counts.cumsum(0) - counts)
    places = torch.arange(total, device=order.device) + torch.repeat_interleave(gaps, counts)
    assignment = order.new_full((len(block_expert) * block_size,), total)
    assignment[places] = order
    return ExpertBlocks(assignment, block_expert.int(), block_size, padded.tolist(), total)
