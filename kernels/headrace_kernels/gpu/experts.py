"""`headrace_kernels.experts` on a GPU: stacked, [E, 2 * I, N] and [E, N, I]."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.moe_experts import FEW_TOKENS, best_block_size, moe_experts
from headrace_kernels.routing_rule import RoutedTokens


class StackedExperts:
    """See `headrace_kernels.experts.Experts`."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self._gate_up = gate_up
        self._down = down

    def put(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert, : len(gate)] = gate
        self._gate_up[expert, len(gate) :] = up
        self._down[expert] = down

    def copy(self, expert: int, other: StackedExperts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert], self._down[expert] = other._gate_up[its], other._down[its]

    def block_size(self, num_assignments: int) -> int:
        """See `headrace_kernels.experts.Experts`."""
        return best_block_size(num_assignments, len(self._down))

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`."""
        return multiply(routed, residual, self._gate_up, self._down)


def multiply(
    routed: RoutedTokens,
    residual: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return [T, N] for stacked weights; `scales` of both where they are in 8 bits. See `moe_experts`."""
    return moe_experts(
        routed.x,
        routed.experts,
        routed.weights,
        gate_up,
        down,
        # So few tokens go by the experts as chosen, two launches; sorting them came with the routing.
        blocks=None if len(routed.x) <= FEW_TOKENS else routed.blocks,
        residual=residual,
        scales=scales,
    )


def empty(count: int, hidden: int, width: int, like: Tensor) -> StackedExperts:
    """See `headrace_kernels.experts.empty_experts`."""
    return StackedExperts(like.new_empty(count, 2 * width, hidden), like.new_empty(count, hidden, width))
