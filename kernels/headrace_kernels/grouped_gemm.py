"""Multiply each block of rows by the weight of its expert: the third step of a mixture-of-experts layer.

Shapes: rows in the order of `ExpertBlocks`, I inputs, O outputs, E experts, T tokens, K experts per token, N hidden.
Bytes read for few tokens: the weights of the experts hit, each once. FLOPs: 2 * rows * I * O.

`grouped_gemm` is the entry, `grouped_gemm_ref` the specification; `silu_mul` and `combine` go before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.linear import Linear
from headrace_kernels.moe_sort import ExpertBlocks


def dispatch(x: Tensor, blocks: ExpertBlocks, num_experts_per_token: int) -> Tensor:
    """Return the token of each row, [rows, N], for `x` [T, N]; a row of padding gets the last token's values."""
    tokens = blocks.assignment // num_experts_per_token
    if blocks.block_size > 1:
        tokens = tokens.clamp_(max=len(x) - 1)
    return x.index_select(0, tokens)


def grouped_gemm(rows: Tensor, experts: Sequence[Linear], blocks: ExpertBlocks) -> Tensor:
    """Return `rows` [rows, I] times the weights of their blocks' experts, [rows, O].

    Rows of padding hold finite values of no meaning, if they did in `rows`.

    Raises:
        ValueError: the blocks do not cover the rows.
    """
    if len(rows) != len(blocks.assignment):
        raise ValueError(f"rows {tuple(rows.shape)} but the blocks hold {len(blocks.assignment)} rows")
    out = rows.new_empty((len(rows), experts[0].out_features))
    pieces = zip(rows.split(blocks.expert_rows), out.split(blocks.expert_rows), strict=True)
    for expert, (piece, place) in zip(experts, pieces, strict=True):
        if len(piece):
            place.copy_(expert(piece))
    return out


def grouped_gemm_ref(rows: Tensor, weight: Tensor, blocks: ExpertBlocks) -> Tensor:
    """Specification of `grouped_gemm` in plain torch, for weights stacked as [E, O, I]."""
    per_row = blocks.block_expert.long().repeat_interleave(blocks.block_size)
    return torch.einsum("ri,roi->ro", rows.float(), weight[per_row].float()).to(rows.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., I], for `gate_up` [..., 2 * I]: gate columns, then up columns."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def combine(rows: Tensor, weights: Tensor, blocks: ExpertBlocks) -> Tensor:
    """Return each token's weighted sum over its experts.

    Args:
        rows: [rows, N], in the order of `blocks`.
        weights: [T, K] float32.
        blocks: where each assignment's row is.

    Returns:
        [T, N], dtype of `rows`; summed in float32.
    """
    place = weights.new_empty(blocks.num_assignments + 1, dtype=torch.int64)
    place[blocks.assignment] = torch.arange(len(rows), device=rows.device)
    per_token = rows.index_select(0, place[:-1]).view(*weights.shape, -1)
    out = per_token[:, 0] * weights[:, 0, None]
    for k in range(1, weights.shape[1]):
        out.addcmul_(per_token[:, k], weights[:, k, None])
    return out.to(rows.dtype)
