"""`headrace_kernels.experts` in blocks of FP8 on a GPU, stacked; of many rows activations are quantised, too.

Shapes: E experts, N hidden, I width. Weights [E, 2 * I, N] and [E, N, I]; scales as `moe_experts` takes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.block_fp8 import Block, BlockFp8
from headrace_kernels.fp8_groups import FP8, GROUP, num_groups
from headrace_kernels.gpu.experts import multiply
from headrace_kernels.moe_experts import best_block_size
from headrace_kernels.routing_rule import RoutedTokens


class StackedFp8Experts:
    """See `headrace_kernels.experts.Experts`."""

    def __init__(self, count: int, hidden: int, width: int, like: Tensor) -> None:
        self._gate_up = like.new_empty(count, 2 * width, hidden, dtype=FP8)
        self._down = like.new_empty(count, hidden, width, dtype=FP8)
        groups_in, groups = num_groups(hidden), num_groups(width)
        self._gate_up_scale = like.new_empty(count, 2 * groups, groups_in, dtype=torch.float32)
        self._down_scale = like.new_empty(count, groups_in, groups, dtype=torch.float32)

    def put(self, expert: int, gate: BlockFp8, up: BlockFp8, down: BlockFp8) -> None:
        """See `headrace_kernels.experts.Experts`."""
        for half, weight in enumerate((gate, up)):
            _halves(self._gate_up[expert])[half] = weight.values
            _halves(self._gate_up_scale[expert])[half] = weight.scales
        self._down[expert] = down.values
        self._down_scale[expert] = down.scales

    def copy(self, expert: int, other: StackedFp8Experts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine[expert] = theirs[its]

    def block_size(self, num_assignments: int) -> int:
        """See `headrace_kernels.experts.Experts`."""
        return best_block_size(num_assignments, len(self._down))

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`."""
        scales = (self._gate_up_scale, self._down_scale)
        return multiply(routed, residual, self._gate_up, self._down, scales)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self._gate_up, self._down, self._gate_up_scale, self._down_scale


def _halves(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (2, -1))


def empty(count: int, hidden: int, width: int, like: Tensor, blocks: tuple[Block, Block]) -> StackedFp8Experts:
    """See `headrace_kernels.experts.empty_experts`."""
    other = next((block for block in blocks if block != (GROUP, GROUP)), None)
    if other:
        raise ValueError(f"blocks of {other[0]} x {other[1]}; the kernels take {GROUP} x {GROUP}")
    if like.dtype != torch.bfloat16:
        raise ValueError(f"activations of {like.dtype}; the kernels take torch.bfloat16")
    return StackedFp8Experts(count, hidden, width, like)
