"""A mixture-of-experts layer whose experts are a list of packed weights: sort, dispatch, multiply, combine.

Shapes: T tokens, N hidden, K experts per token, E experts, I inputs and O outputs of a product, rows in the order of
the blocks. An assignment is a pair (token, k), numbered `token * K + k`. Bytes read for few tokens: the weights of the
experts hit, each once; FLOPs: 2 * rows * I * O a product. So memory bandwidth bounds it until an expert has some 200
rows.

What a loop over experts on a CPU wants: counts come to the host. `moe_sort` and `prepare_blocks` bring tokens into the
order of their experts and cut that into blocks; `dispatch`, `grouped_gemm` (specification `grouped_gemm_ref`) and
`combine` do the rest. Stacked weights have `moe_experts`.
Source: vllm-project/vllm, moe_align_block_size, whose result the blocks are, in two visible steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_kernels.dispatch import select
from headrace_kernels.expert_blocks import ExpertBlocks
from headrace_kernels.linear import Linear


def moe_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the assignments by expert; within an expert by token.

    Args:
        experts: [T, K] int64, each in [0, E).
        num_experts: E.

    Returns:
        The assignments in order, [T * K] int64, and each expert's number of them, [E] int64.
    """
    return select("packed_experts", experts).moe_sort(experts, num_experts)


def prepare_blocks(order: Tensor, counts: Tensor, block_size: int) -> ExpertBlocks:
    """Pad each expert's assignments to whole blocks; an expert without any has no block.

    Synchronises with the device once, to bring `counts` to the host.

    Args:
        order: [T * K] int64, from `moe_sort`.
        counts: [E] int64, from `moe_sort`.
        block_size: rows of a block, at least 1; 1 pads nothing.
    """
    return select("packed_experts", order).prepare_blocks(order, counts, block_size)


def dispatch(x: Tensor, blocks: ExpertBlocks, num_experts_per_token: int) -> Tensor:
    """Return the token of each row, [rows, N], for `x` [T, N]; a row of padding gets the last token's values."""
    return select("packed_experts", x).dispatch(x, blocks, num_experts_per_token)


def grouped_gemm(rows: Tensor, experts: Sequence[Linear], blocks: ExpertBlocks) -> Tensor:
    """Return `rows` [rows, I] times the weights of their blocks' experts, [rows, O].

    Rows of padding hold finite values of no meaning, if they did in `rows`.

    Raises:
        ValueError: the blocks do not cover the rows.
    """
    if len(rows) != len(blocks.assignment):
        raise ValueError(f"rows {tuple(rows.shape)} but the blocks hold {len(blocks.assignment)} rows")
    return select("packed_experts", rows).grouped_gemm(rows, experts, blocks)


def grouped_gemm_ref(rows: Tensor, weight: Tensor, blocks: ExpertBlocks) -> Tensor:
    """Specification of `grouped_gemm` in plain torch, for weights stacked as [E, O, I]."""
    per_row = blocks.block_expert.long().repeat_interleave(blocks.block_size)
    return torch.einsum("ri,roi->ro", rows.float(), weight[per_row].float()).to(rows.dtype)


def combine(rows: Tensor, weights: Tensor, blocks: ExpertBlocks) -> Tensor:
    """Return each token's weighted sum over its experts.

    Args:
        rows: [rows, N], in the order of `blocks`.
        weights: [T, K] float32.
        blocks: where each assignment's row is.

    Returns:
        [T, N], dtype of `rows`; summed in float32.
    """
    return select("packed_experts", rows).combine(rows, weights, blocks)
