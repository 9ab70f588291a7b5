"""`headrace_kernels.experts` in plain torch: a list of linear layers, packed as oneDNN wants, and a loop over it."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.linear import Linear
from headrace_kernels.packed_experts import combine, dispatch, grouped_gemm, moe_sort, prepare_blocks
from headrace_kernels.routing_rule import RoutedTokens
from headrace_kernels.silu_mul import silu_mul

# Many tokens: an expert's rows are padded to whole tiles, so that few shapes occur. Few: weights are what costs.
_TILE_ROWS = 32
_ROWS_WORTH_TILES = 16


class ListedExperts:
    """See `headrace_kernels.experts.Experts`."""

    def __init__(self, count: int, hidden: int, width: int, like: Tensor) -> None:
        self._gate_up: list[Linear | None] = [None] * count
        self._down: list[Linear | None] = [None] * count

    def put(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert] = Linear(torch.cat((gate, up)))
        self._down[expert] = Linear(down)

    def copy(self, expert: int, other: ListedExperts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert], self._down[expert] = other._gate_up[its], other._down[its]

    def block_size(self, num_assignments: int) -> None:
        """See `headrace_kernels.experts.Experts`."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`."""
        is_here = routed.experts >= 0
        if not bool(is_here.all()):
            return self._some(routed, is_here, residual)
        gate_up, down = ([each for each in held if each is not None] for held in (self._gate_up, self._down))
        order, counts = moe_sort(routed.experts, len(down))
        is_tiled = len(order) >= _ROWS_WORTH_TILES * len(down)
        blocks = prepare_blocks(order, counts, _TILE_ROWS if is_tiled else 1)
        rows = dispatch(routed.x, blocks, routed.experts.shape[1])
        rows = grouped_gemm(silu_mul(grouped_gemm(rows, gate_up, blocks)), down, blocks)
        return combine(rows, routed.weights, blocks).add_(residual)

    def _some(self, routed: RoutedTokens, is_here: Tensor, residual: Tensor) -> Tensor:
        """Compute the assignments of `is_here` [T, K] alone: padding and other ranks' experts have no row."""
        token, k = is_here.nonzero(as_tuple=True)
        if not len(token):
            return residual.clone()
        rows = RoutedTokens(
            routed.x[token], routed.experts[token, k, None], routed.weights[token, k, None], routed.blocks
        )
        out = self(rows, torch.zeros_like(rows.x)).float()
        return residual.float().index_add(0, token, out).to(residual.dtype)


def empty(count: int, hidden: int, width: int, like: Tensor) -> ListedExperts:
    """See `headrace_kernels.experts.empty_experts`."""
    return ListedExperts(count, hidden, width, like)
