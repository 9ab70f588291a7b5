"""Calls of `moe_routing` whose launches must compile for every target."""

from __future__ import annotations

import torch

from headrace_kernels import moe_routing as family
from headrace_kernels.aot.case import AotCase
from headrace_kernels.routing_rule import RoutingRule

# The rules of real models by name, for compilation and measurement; each with its number of experts and of shared ones.
MODEL_RULES: dict[str, tuple[RoutingRule, int, int]] = {
    "V2-Lite": (RoutingRule(6, "softmax"), 64, 2),
    "V3": (RoutingRule(8, "sigmoid", 8, 4, True, True, 2.5), 256, 1),
    "V2": (RoutingRule(6, "softmax", 8, 3, scaling_factor=16.0), 160, 2),
    "Kimi-K2": (RoutingRule(8, "sigmoid", is_normalised=True, scaling_factor=2.827), 384, 1),
    "Mixtral": (RoutingRule(2, "softmax", is_normalised=True), 8, 0),
}


def aot_cases() -> list[AotCase]:
    """The rules of real models."""

    def case(name: str) -> AotCase:
        rule, num_experts, num_shared = MODEL_RULES[name]
        logits, bias = (torch.empty(s, dtype=torch.float32, device="meta") for s in ((128, num_experts), num_experts))
        has_bias = rule.scoring == "sigmoid"
        return AotCase(
            f"moe_routing {name}", lambda: family.moe_routing(logits, bias if has_bias else None, rule, num_shared)
        )

    return [case(name) for name in MODEL_RULES]
