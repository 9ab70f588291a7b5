"""Tokens travel to their experts and rows back: what is computed meanwhile."""

from __future__ import annotations

import torch
from headrace_core.model.dispatch import Dispatcher
from headrace_core.model.group_experts import DispatchedExperts
from headrace_core.ranks.group import Ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.doubling_experts import DoublingExperts
from headrace_core.testing.patient_group import PatientGroup
from headrace_kernels.routing_rule import RoutedTokens


def test_the_shared_expert_is_computed_while_tokens_travel():
    said: list[str] = []
    world = PatientGroup(said, "exchange")
    dispatcher = Dispatcher(((0, 1, 2, 3),), world, torch.device("cpu"))
    routed, shared = DoublingExperts("routed experts", said), DoublingExperts("shared expert", said)
    experts = DispatchedExperts(routed, 1, shared, dispatcher, Ranks(ParallelLayout(), world, world))
    x = torch.arange(6.0).view(3, 2)
    chosen = torch.tensor([[0, 1, 4], [2, 3, 4], [1, 1, 4]])
    out = experts(RoutedTokens(x, chosen, torch.full((3, 3), 0.5), None), x)
    dispatched, combined = ["exchange begins", "shared expert", "exchange waited"], ["exchange begins"]
    assert said == [*dispatched, "routed experts", *combined, "exchange waited"]
    # The residual, the shared expert's with weight 1, and two routed ones with half a weight each.
    assert torch.equal(out, x + 2 * x + 2 * x)
