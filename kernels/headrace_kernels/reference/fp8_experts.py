"""`headrace_kernels.experts` over weights in blocks of FP8 (`block_fp8`), in plain torch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.block_fp8 import Block, BlockFp8
from headrace_kernels.reference import fp8_linear
from headrace_kernels.routing_rule import RoutedTokens


class HeldExperts:
    """See `headrace_kernels.experts.Experts`; an expert's weights are dequantised where a token chose it."""

    def __init__(self, count: int) -> None:
        self._held: list[tuple[BlockFp8, BlockFp8, BlockFp8] | None] = [None] * count

    def put(self, expert: int, gate: BlockFp8, up: BlockFp8, down: BlockFp8) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._held[expert] = (gate, up, down)

    def copy(self, expert: int, other: HeldExperts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._held[expert] = other._held[its]

    def block_size(self, num_assignments: int) -> None:
        """See `headrace_kernels.experts.Experts`."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`; a token's experts are added up in their order, rounded once."""
        out = residual.float()
        for expert in routed.experts.unique().tolist():
            if expert < 0:
                continue  # of padding
            held = self._held[expert]
            assert held is not None, "every expert was put"
            gate, up, down = held
            tokens, places = (routed.experts == expert).nonzero(as_tuple=True)
            rows = routed.x[tokens].float()
            hidden = F.silu(fp8_linear.packed_linear(rows, gate, None, gate.shape[0]))
            hidden = hidden * fp8_linear.packed_linear(rows, up, None, up.shape[0])
            rows = fp8_linear.packed_linear(hidden, down, None, down.shape[0])
            out = out.index_add(0, tokens, rows * routed.weights[tokens, places, None])
        return out.to(residual.dtype)


def empty(count: int, hidden: int, width: int, like: Tensor, blocks: tuple[Block, Block]) -> HeldExperts:
    """See `headrace_kernels.experts.empty_experts`; any blocks will do."""
    return HeldExperts(count)
