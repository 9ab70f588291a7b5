"""Dense and mixture-of-experts feed-forward networks.

Letters: T tokens, N hidden, I width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.linear import Linear
from headrace_kernels.moe_routing import moe_routing
from headrace_kernels.packed_experts import combine, dispatch, grouped_gemm, moe_sort, prepare_blocks
from headrace_kernels.routing_rule import RoutingRule
from headrace_kernels.silu_mul import silu_mul
from torch import Tensor

from headrace_core.model.op_timer import OFF, OpTimer

# Many tokens: an expert's rows are padded to whole tiles, so that few shapes occur. Few: weights are what costs.
_TILE_ROWS = 32
_ROWS_WORTH_TILES = 16


class FeedForward(Protocol):
    """What a layer does after attention."""

    def __call__(self, x: Tensor, timer: OpTimer) -> Tensor:
        """Return [T, N] for `x` [T, N], to be added to the residual; `timer` is told what ran."""
        ...


class DenseMlp:
    """down(silu(gate(x)) * up(x)); `gate_up` [2 * I, N] is both projections at once."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: Tensor, timer: OpTimer) -> Tensor:
        """See `FeedForward`."""
        out = self._down(silu_mul(self._gate_up(x)))
        timer.mark("dense_ffn")
        return out

    def decode(self, x: Tensor, norm_weight: Tensor, eps: float, slot_mapping: Tensor) -> tuple[Tensor, None]:
        """See `FusedFeedForward`."""
        hidden = silu_mul(norm_linear(x, norm_weight, self._gate_up.weight, eps))
        return linear_add(hidden, self._down.weight, x), None


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Weights of one layer.

    `router` [E, N] and `bias` [E] are float32; an expert has `gate_up` [2 * I, N] and `down` [N, I].
    """

    router: Tensor
    bias: Tensor | None
    gate_up: Sequence[Linear]
    down: Sequence[Linear]
    shared: DenseMlp | None


class MoeMlp:
    """Routed experts and, for some networks, shared ones that every token passes.

    `expert_counts` [E] counts assignments since it was last taken.
    """

    def __init__(self, rule: RoutingRule, weights: MoeWeights) -> None:
        self._rule = rule
        self._weights = weights
        self._counts = [0] * len(weights.gate_up)

    def __call__(self, x: Tensor, timer: OpTimer) -> Tensor:
        """See `FeedForward`."""
        weights = self._weights
        logits = F.linear(x.float(), weights.router)
        experts, expert_weights = moe_routing(logits, weights.bias, self._rule)
        order, counts = moe_sort(experts, len(weights.gate_up))
        is_tiled = len(order) >= _ROWS_WORTH_TILES * len(weights.gate_up)
        blocks = prepare_blocks(order, counts, _TILE_ROWS if is_tiled else 1)
        self._counts = [a + b for a, b in zip(self._counts, counts.tolist(), strict=True)]
        timer.mark("router")
        rows = dispatch(x, blocks, experts.shape[1])
        timer.mark("dispatch")
        rows = silu_mul(grouped_gemm(rows, weights.gate_up, blocks))
        timer.mark("expert_gate+expert_up")
        rows = grouped_gemm(rows, weights.down, blocks)
        timer.mark("expert_down")
        out = combine(rows, expert_weights, blocks)
        timer.mark("combine")
        if weights.shared is not None:
            out = out + weights.shared(x, OFF)
            timer.mark("shared_experts")
        return out

    def take_counts(self) -> list[int]:
        """Return how many assignments each expert got since the last call."""
        counts, self._counts = self._counts, [0] * len(self._counts)
        return counts
