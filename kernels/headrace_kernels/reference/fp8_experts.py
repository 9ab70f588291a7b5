"""`headrace_kernels.fp8_experts` in plain torch: an expert's weights are dequantised when a token chose it.

A few milliseconds an expert and layer, whatever the number of its rows: slow in decoding, little beside a long prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.routing_rule import RoutedTokens
from headrace_kernels.silu_mul import silu_mul


class HeldExperts:
    """See `headrace_kernels.fp8_experts.Fp8Experts`."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self._held: list[tuple[BlockFp8, BlockFp8, BlockFp8] | None] = [None] * count
        self._dtype = dtype

    def put(self, expert: int, gate: BlockFp8, up: BlockFp8, down: BlockFp8) -> None:
        """See `headrace_kernels.fp8_experts.Fp8Experts`."""
        self._held[expert] = (gate, up, down)

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
            rows = F.linear(routed.x[tokens], torch.cat((gate.to(self._dtype), up.to(self._dtype))))
            rows = F.linear(silu_mul(rows), down.to(self._dtype)).float()
            out = out.index_add(0, tokens, rows * routed.weights[tokens, places, None])
        return out.to(residual.dtype)


def empty(count: int, hidden: int, width: int, like: Tensor, block: tuple[int, int]) -> HeldExperts:
    """See `headrace_kernels.fp8_experts.empty_fp8_experts`; any block will do."""
    return HeldExperts(count, like.dtype)
