"""`headrace_kernels.packed_experts` in plain torch: a loop over experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_kernels.expert_blocks import ExpertBlocks
from headrace_kernels.linear import Linear


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """See `headrace_kernels.packed_experts.moe_sort`."""
    flat = experts.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)


def prepare_blocks(order: Tensor, counts: Tensor, block_size: int) -> ExpertBlocks:
    """See `headrace_kernels.packed_experts.prepare_blocks`."""
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


def dispatch(x: Tensor, blocks: ExpertBlocks, num_experts_per_token: int) -> Tensor:
    """See `headrace_kernels.packed_experts.dispatch`."""
    tokens = blocks.assignment // num_experts_per_token
    if blocks.block_size > 1:
        tokens = tokens.clamp_(max=len(x) - 1)
    return x.index_select(0, tokens)


def grouped_gemm(rows: Tensor, experts: Sequence[Linear], blocks: ExpertBlocks) -> Tensor:
    """See `headrace_kernels.packed_experts.grouped_gemm`."""
    out = rows.new_empty((len(rows), experts[0].out_features))
    pieces = zip(rows.split(blocks.expert_rows), out.split(blocks.expert_rows), strict=True)
    for expert, (piece, place) in zip(experts, pieces, strict=True):
        if len(piece):
            place.copy_(expert(piece))
    return out


def combine(rows: Tensor, weights: Tensor, blocks: ExpertBlocks) -> Tensor:
    """See `headrace_kernels.packed_experts.combine`."""
    place = weights.new_empty(blocks.num_assignments + 1, dtype=torch.int64)
    place[blocks.assignment] = torch.arange(len(rows), device=rows.device)
    per_token = rows.index_select(0, place[:-1]).view(*weights.shape, -1)
    out = per_token[:, 0] * weights[:, 0, None]
    for k in range(1, weights.shape[1]):
        out.addcmul_(per_token[:, k], weights[:, k, None])
    return out.to(rows.dtype)
