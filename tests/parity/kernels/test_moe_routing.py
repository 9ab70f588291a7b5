"""Routing against its specification, on logits that are distinct: on ties a specification has no say."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.aot.cases.moe_routing import MODEL_RULES
from headrace_kernels.moe_routing import moe_routing, moe_routing_ref
from headrace_kernels.routing_rule import RoutingRule


def distinct_logits(num_rows, num_experts, device):
    """Logits a hundredth apart at least, in a random order."""
    ranks = torch.stack([torch.randperm(num_experts) for _ in range(num_rows)]) if num_rows else torch.zeros(0, 1)
    return ((ranks.expand(num_rows, num_experts) / num_experts - 0.5) * min(0.02 * num_experts, 8)).to(device)


def assert_same_routing(found, expected):
    experts, order = found[0].sort(dim=1)
    expected_experts, expected_order = expected[0].sort(dim=1)
    assert found[0].dtype == torch.int64
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(found[1].gather(1, order), expected[1].gather(1, expected_order), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODEL_RULES)
def test_the_rules_of_real_models(name, device):
    rule, num_experts, num_shared = MODEL_RULES[name]
    logits = distinct_logits(3, num_experts, device)
    bias = torch.rand(num_experts, device=device) * 0.3 if rule.scoring == "sigmoid" else None
    assert_same_routing(moe_routing(logits, bias, rule, num_shared), moe_routing_ref(logits, bias, rule, num_shared))


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "rule"),
    [
        (2, 7, RoutingRule(3, "softmax", is_normalised=True, scaling_factor=2.5)),
        (2, 15, RoutingRule(4, "sigmoid", 5, 3, True)),
        (2, 21, RoutingRule(5, "softmax", 3, 1)),
        (1, 6, RoutingRule(3, "sigmoid", 6, 3)),
        (1, 20, RoutingRule(16, "softmax")),
        (1, 1, RoutingRule(1, "sigmoid")),
        (0, 4, RoutingRule(1, "softmax")),
        (1, 8, RoutingRule(2, "softmax", 4, 4, True)),
    ],
)
@pytest.mark.parametrize("num_shared", [0, 3])
def test_sizes_that_are_not_powers_of_two(num_rows, num_experts, rule, num_shared, device):
    logits = distinct_logits(num_rows, num_experts, device)
    bias = torch.rand(num_experts, device=device) * 0.2
    assert_same_routing(moe_routing(logits, bias, rule, num_shared), moe_routing_ref(logits, bias, rule, num_shared))


def test_of_equals_the_lowest_is_chosen(device):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0]], device=device)
    assert moe_routing(logits, None, RoutingRule(2, "softmax"))[0].tolist() == [[1, 2]]
    grouped = RoutingRule(2, "sigmoid", 3, 1, True)
    assert moe_routing(torch.zeros(1, 6, device=device), None, grouped)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("rule", [RoutingRule(2, "softmax"), RoutingRule(2, "sigmoid", 2, 1, True)])
def test_a_nan_spoils_the_weights_of_its_token_alone(rule, device):
    logits = distinct_logits(3, 6, device)
    alone = moe_routing(logits[:1], None, rule, 1)
    logits[1, 2] = float("nan")
    experts, weights = moe_routing(logits, None, rule, 1)
    assert weights[1, :2].isnan().all()
    assert bool(((experts >= 0) & (experts < 7)).all())
    assert torch.equal(experts[0], alone[0][0])
    assert torch.equal(weights[0], alone[1][0])


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(7, "softmax"),
        RoutingRule(1, "softmax", num_groups=4),
        RoutingRule(4, "softmax", 2, 1),
        RoutingRule(1, "sigmoid", 6, 2, True),
        RoutingRule(1, "sigmoid", 2, 0),
    ],
)
def test_a_rule_that_cannot_be_applied_is_refused(rule, device):
    with pytest.raises(ValueError, match="experts"):
        moe_routing(torch.zeros(1, 6, device=device), None, rule)
