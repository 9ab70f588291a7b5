"""Bring tokens into the order of their experts, and cut that order into blocks of one expert each.

Shapes: T tokens, K experts per token, E experts. An assignment is a pair (token, k), numbered `token * K + k`.
First two of the three steps of a mixture-of-experts layer; the third is `grouped_gemm`.
Tiny: T * K numbers read, about as many written; bound by launch latency.

`sort_blocks` leaves all on the device: what a kernel's grid and a CUDA graph want; `sort_blocks_ref` specifies it.
Source: vllm-project/vllm, moe_align_block_size, whose result this is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.expert_blocks import DeviceBlocks, bounds


def sort_blocks(
    experts: Tensor, num_experts: int, block_size: int, *, first_local: int = 0, num_local: int | None = None
) -> DeviceBlocks:
    """Sort the assignments by expert, within an expert by token, and pad each expert's to whole blocks.

    Does not synchronise with the device. Only the experts that are local take part: the assignments of others, and of
    experts outside [0, E) such as -1, have no row.

    Args:
        experts: [T, K] int32 or int64.
        num_experts: E.
        block_size: rows of a block, at least 1.
        first_local: the first expert whose weights are here.
        num_local: how many experts' weights are here; None: all from `first_local` on.

    Raises:
        ValueError: the dtype does not fit, or the local experts are not among the E.
    """
    num_local = num_experts - first_local if num_local is None else num_local
    if experts.dtype not in (torch.int32, torch.int64) or experts.ndim != 2:
        raise ValueError(f"experts {tuple(experts.shape)} {experts.dtype} must be [T, K] int32 or int64")
    check_local(num_experts, block_size, first_local, num_local)
    return select("moe_sort", experts).sort_blocks(experts, num_experts, block_size, first_local, num_local)


def check_local(num_experts: int, block_size: int, first_local: int, num_local: int) -> None:
    """Raise ValueError unless the local experts are among the E and a block has a row."""
    if block_size < 1 or first_local < 0 or num_local < 0 or first_local + num_local > num_experts:
        raise ValueError(
            f"blocks of {block_size} rows for experts {first_local}..{first_local + num_local} of {num_experts}"
        )


def sort_blocks_ref(
    experts: Tensor, num_experts: int, block_size: int, *, first_local: int, num_local: int
) -> DeviceBlocks:
    """Specification of `sort_blocks` in plain torch."""
    flat = experts.reshape(-1).long()
    total = len(flat)
    max_rows, max_blocks = bounds(total, num_local, block_size)
    is_local = (flat >= first_local) & (flat < first_local + num_local)
    local = torch.where(is_local, flat - first_local, num_local)
    counts = torch.bincount(local, minlength=num_local + 1)
    num_blocks = (counts + block_size - 1) // block_size
    num_blocks[num_local] = 0
    ends = num_blocks.cumsum(0)
    order = local.argsort(stable=True)
    sorted_local = local[order]
    rank = torch.arange(total, device=flat.device) - (counts.cumsum(0) - counts)[sorted_local]
    place = ((ends - num_blocks) * block_size)[sorted_local] + rank
    is_kept = sorted_local < num_local
    assignment = flat.new_full((max_rows,), total, dtype=torch.int32)
    assignment[place[is_kept]] = order[is_kept].int()
    blocks = torch.arange(max_blocks, device=flat.device)
    block_expert = torch.where(blocks < ends[-1], torch.searchsorted(ends, blocks, right=True), -1)
    is_expert = (flat >= 0) & (flat < num_experts)
    all_counts = torch.bincount(flat[is_expert], minlength=num_experts)
    return DeviceBlocks(assignment, block_expert.int(), ends[-1:].int(), all_counts.int(), block_size, total)
