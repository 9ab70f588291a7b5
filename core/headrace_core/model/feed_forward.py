"""Dense and mixture-of-experts feed-forward networks.

Letters: T tokens, N hidden, I width, E routed experts, S shared experts, K experts per token. A shared expert is one
that every token chooses with weight 1: S more columns of a token's choice.
"""

from __future__ import annotations

from typing import Protocol

import torch
from headrace_kernels.linear import Linear
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.routing_rule import RoutedTokens, Router
from headrace_kernels.silu_mul import silu_mul
from torch import Tensor

from headrace_core.model.group_linear import OntoResidual
from headrace_core.model.op_timer import OpTimer


class FeedForward(Protocol):
    """What a layer does after attention."""

    def __call__(
        self, x: Tensor, norm_weight: Tensor, eps: float, slot_mapping: Tensor, timer: OpTimer
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [T, N] after this network for `x` [T, N], and the experts chosen [T, K + S].

        The experts are None for a network without. A row whose slot is -1 is padding: it need not be right, and chooses
        no expert (-1). `timer` is told what ran, from the norm on.
        """
        ...


class LayerExperts(Protocol):
    """A layer's experts, as `headrace_kernels.experts.Experts` that hold them all, or spread over ranks."""

    def block_size(self, num_assignments: int) -> int | None:
        """See `Experts`."""
        ...

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `Experts`."""
        ...


class DenseMlp:
    """x + down(silu(gate(norm(x))) * up(norm(x))); `gate_up` [2 * I, N] is both projections at once."""

    def __init__(self, gate_up: Linear, down: OntoResidual) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(
        self, x: Tensor, norm_weight: Tensor, eps: float, slot_mapping: Tensor, timer: OpTimer
    ) -> tuple[Tensor, None]:
        """See `FeedForward`."""
        hidden = silu_mul(self._gate_up.after_norm(x, norm_weight, eps))
        out = self._down.added_to(x, hidden)
        # With its norm. A name stands once in a step: the norm's is that of the mixtures, which are most layers.
        timer.mark("dense_ffn")
        return out, None


class MoeMlp:
    """Routed experts and, for some networks, shared ones that every token passes."""

    def __init__(self, router: Router, experts: LayerExperts) -> None:
        self.router = router
        self.experts = experts
        shared = ["shared_experts"] if router.num_shared else []
        self._name = "+".join(["dispatch", "expert_gate", "expert_up", "expert_down", "combine", *shared])

    def __call__(
        self, x: Tensor, norm_weight: Tensor, eps: float, slot_mapping: Tensor, timer: OpTimer
    ) -> tuple[Tensor, Tensor]:
        """See `FeedForward`."""
        num_assignments = len(x) * (self.router.rule.num_experts_per_token + self.router.num_shared)
        block_size = self.experts.block_size(num_assignments)
        routed = route_and_sort(x, norm_weight, eps, self.router, block_size, slot_mapping=slot_mapping)
        timer.mark("ffn_norm+router")
        out = self.experts(routed, x)
        timer.mark(self._name)
        return out, routed.experts

    def without_tokens(self, like: Tensor) -> None:
        """Compute what other ranks' tokens ask of experts here, for a step in which this rank's lane has none.

        `like`: [0, N], of the residual stream's dtype and device.
        """
        experts = torch.empty(
            0, self.router.rule.num_experts_per_token + self.router.num_shared, dtype=torch.int64, device=like.device
        )
        self.experts(RoutedTokens(like, experts, experts.float(), None), like)
