"""Mixture of experts on a GPU: experts' weights stacked, shared experts folded in, nothing known on the host.

Letters: T tokens, N hidden, I width of an expert, E routed experts, S shared experts, K experts per token.
A shared expert is an expert that every token chooses with weight 1: S more columns of a token's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from headrace_kernels.moe_experts import FEW_TOKENS, best_block_size, moe_experts
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.moe_routing import moe_routing
from headrace_kernels.routing_rule import Router, RoutingRule
from torch import Tensor

from headrace_core.model.host_copies import HostBuffer
from headrace_core.model.op_timer import OpTimer


@dataclass(frozen=True, slots=True)
class StackedMoeWeights:
    """Weights of one layer.

    `router` [E, N] and `bias` [E] are float32; `gate_up` [E + S, 2 * I, N], `down` [E + S, N, I], shared experts last.
    """

    router: Tensor
    bias: Tensor | None
    gate_up: Tensor
    down: Tensor

    @property
    def num_shared(self) -> int:
        """S."""
        return len(self.down) - len(self.router)


class ExpertCounts:
    """How often each expert was chosen, counted on the device. Engine thread only.

    A step sends its counts behind its launches, to pinned memory; who takes them after the step's tokens does not wait.
    """

    def __init__(self, num_layers: int, num_experts: int, num_per_token: int, device: torch.device) -> None:
        self._num_per_token = num_per_token
        self._counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._sent = HostBuffer(self._counts.shape, self._counts.dtype, device)

    def add(self, index: int, experts: Tensor) -> None:
        """Count the choice of mixture layer `index`, [T, K or more]; columns past K are shared experts."""
        self._add(self._counts[index : index + 1], experts[None])

    def add_all(self, experts: Tensor) -> None:
        """Count the choices of all mixture layers, [layers, T, K or more]."""
        self._add(self._counts, experts)

    def send(self) -> None:
        """Let the next `take` return what was counted so far."""
        self._sent.receive(self._counts)

    def take(self) -> list[list[int]]:
        """Return the counts sent since the last call, by layer; what was counted and not sent is forgotten."""
        self._sent.wait()
        counts: list[list[int]] = self._sent.values.numpy().tolist()
        self._sent.values.zero_()
        self._counts.zero_()
        return counts

    def _add(self, counts: Tensor, experts: Tensor) -> None:
        chosen = experts[:, :, : self._num_per_token].flatten(1).long()
        counts.scatter_add_(1, chosen, self._one.expand_as(chosen))


class StackedMoeMlp:
    """`FeedForward` and `FusedFeedForward` of one layer; the calls of `FeedForward` count what was chosen."""

    def __init__(self, rule: RoutingRule, weights: StackedMoeWeights) -> None:
        self._rule = rule
        self._weights = weights
        self._router = Router(weights.router, weights.bias, rule, weights.num_shared)
        self._counts, self._index = self.new_counts(1), 0

    def __call__(self, x: Tensor, timer: OpTimer) -> Tensor:
        """See `FeedForward`."""
        weights = self._weights
        logits = F.linear(x.float(), weights.router)
        experts, expert_weights = moe_routing(logits, weights.bias, self._rule, num_shared=weights.num_shared)
        self._counts.add(self._index, experts)
        timer.mark("router")
        out = moe_experts(x, experts, expert_weights, weights.gate_up, weights.down)
        timer.mark("dispatch+expert_gate+expert_up+expert_down+combine")
        return out

    def decode(self, x: Tensor, norm_weight: Tensor, eps: float, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusedFeedForward`; the experts [B, K + S] are not counted here."""
        weights, router = self._weights, self._router
        num_assignments = len(x) * (self._rule.num_experts_per_token + router.num_shared)
        block_size = best_block_size(num_assignments, len(weights.down))
        routed = route_and_sort(x, norm_weight, eps, router, block_size, slot_mapping=slot_mapping)
        out = moe_experts(
            routed.x,
            routed.experts,
            routed.weights,
            weights.gate_up,
            weights.down,
            # So few tokens go by the experts as chosen, two launches; sorting them came with the routing.
            blocks=None if len(x) <= FEW_TOKENS else routed.blocks,
            residual=x,
        )
        return out, routed.experts

    def count_in(self, counts: ExpertCounts, index: int) -> None:
        """Count as layer `index` of `counts` from now on."""
        self._counts, self._index = counts, index

    def new_counts(self, num_layers: int) -> ExpertCounts:
        """Return counts for `num_layers` layers like this one."""
        router = self._weights.router
        return ExpertCounts(num_layers, len(router), self._rule.num_experts_per_token, router.device)


def share_counts(networks: Sequence[object]) -> ExpertCounts | None:
    """Let all stacked mixtures among a model's networks count in one place, which is returned; None without any.

    Taking the counts is then one copy from the device, not one a layer.
    """
    stacked = [network for network in networks if isinstance(network, StackedMoeMlp)]
    if not stacked:
        return None
    counts = stacked[0].new_counts(len(stacked))
    for index, network in enumerate(stacked):
        network.count_in(counts, index)
    return counts
