"""Tokens travel to their experts and rows back: what is computed meanwhile."""

from __future__ import annotations

import torch
from headrace_core.model.dispatch import Dispatcher
from headrace_core.model.group_experts import DispatchedExperts
from headrace_core.ranks.group import Ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.patient_group import PatientGroup
from headrace_kernels.routing_rule import RoutedTokens

_NUM_EXPERTS, _NUM_SHARED = 4, 1


class _Doubling:
    """Experts that make twice a token of it, by its weight, and say that they did."""

    def __init__(self, name: str, said: list[str]) -> None:
        self._name, self._said = name, said

    def put(self, expert, gate, up, down):
        raise NotImplementedError

    def block_size(self, num_assignments):
        return None

    def __call__(self, routed, residual):
        self._said.append(self._name)
        return residual + 2 * routed.x * routed.weights.sum(dim=1, keepdim=True)


def _experts(world: PatientGroup) -> DispatchedExperts:
    dispatcher = Dispatcher((tuple(range(_NUM_EXPERTS)),), world, torch.device("cpu"))
    local, shared = _Doubling("routed experts", world.said), _Doubling("shared expert", world.said)
    return DispatchedExperts(local, _NUM_SHARED, shared, dispatcher, Ranks(ParallelLayout(), world, world))


def test_the_shared_expert_is_computed_while_tokens_travel():
    world = PatientGroup()
    x = torch.arange(6.0).view(3, 2)
    experts = torch.tensor([[0, 1, 4], [2, 3, 4], [1, 1, 4]])
    out = _experts(world)(RoutedTokens(x, experts, torch.full((3, 3), 0.5), None), x)
    assert world.said == ["begin", "shared expert", "wait", "routed experts", "begin", "wait"]
    # The residual, the shared expert's with weight 1, and two routed ones with half a weight each.
    assert torch.equal(out, x + 2 * x + 2 * x)
