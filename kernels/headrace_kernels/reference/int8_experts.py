"""`headrace_kernels.experts` over weights in 8 bits (`int8_weights`), in plain torch: the specification, and slow."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.int8_weights import Int8Weight
from headrace_kernels.reference import int8_linear
from headrace_kernels.routing_rule import RoutedTokens


class Int8Experts:
    """See `headrace_kernels.experts.Experts`; what an expert's SiLU gives is quantised again."""

    def __init__(self, count: int, hidden: int, width: int, like: Tensor) -> None:
        self._held: list[tuple[Int8Weight, Int8Weight, Int8Weight] | None] = [None] * count

    def put(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._held[expert] = (int8_linear.pack(gate), int8_linear.pack(up), int8_linear.pack(down))

    def copy(self, expert: int, other: Int8Experts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._held[expert] = other._held[its]

    def block_size(self, num_assignments: int) -> None:
        """See `headrace_kernels.experts.Experts`."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`; a token's experts are added up in their order, rounded once."""
        out = residual.float()
        for expert, held in enumerate(self._held):
            tokens, places = (routed.experts == expert).nonzero(as_tuple=True)
            if held is None or not len(tokens):
                continue
            gate, up, down = held
            rows = routed.x[tokens].float()
            num_hidden = len(gate.values)
            hidden = F.silu(int8_linear.packed_linear(rows, gate, None, num_hidden))
            hidden = hidden * int8_linear.packed_linear(rows, up, None, num_hidden)
            rows = int8_linear.packed_linear(hidden, down, None, out.shape[1])
            out = out.index_add(0, tokens, rows * routed.weights[tokens, places, None])
        return out.to(residual.dtype)


def empty(count: int, hidden: int, width: int, like: Tensor) -> Int8Experts:
    """See `headrace_kernels.experts.empty_experts`."""
    return Int8Experts(count, hidden, width, like)
