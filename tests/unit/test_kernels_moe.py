"""Routing, sorting and grouped products against plain formulations."""

from __future__ import annotations

import contextlib

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.experts import empty_experts
from headrace_kernels.linear import Linear
from headrace_kernels.moe_experts import moe_experts_ref
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.moe_routing import moe_routing
from headrace_kernels.packed_experts import (
    combine,
    dispatch,
    grouped_gemm,
    grouped_gemm_ref,
    moe_sort,
    prepare_blocks,
)
from headrace_kernels.reference.linear import padded_count
from headrace_kernels.routing_rule import RoutedTokens, Router, RoutingRule
from headrace_kernels.silu_mul import silu_mul
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def assignments(draw):
    num_experts = draw(st.integers(1, 9))
    per_token = draw(st.integers(1, num_experts))
    rows = draw(
        st.lists(
            st.permutations(range(num_experts)).map(lambda order: order[:per_token]),
            min_size=1,
            max_size=12,
        )
    )
    return torch.tensor(rows), num_experts


@given(assignments(), st.integers(1, 5))
def test_blocks_hold_every_assignment_once_with_its_own_expert(drawn, block_size):
    experts, num_experts = drawn
    order, counts = moe_sort(experts, num_experts)
    blocks = prepare_blocks(order, counts, block_size)
    flat = experts.flatten()
    assert counts.tolist() == [int((flat == e).sum()) for e in range(num_experts)]
    assert len(blocks.assignment) == len(blocks.block_expert) * block_size
    assert sum(blocks.expert_rows) == len(blocks.assignment)
    rows = blocks.assignment.view(-1, block_size)
    for expert, members in zip(blocks.block_expert.tolist(), rows.tolist(), strict=True):
        real = [a for a in members if a < len(flat)]
        assert real, "no block is all padding"
        assert members == sorted(members), "tokens in order, padding last"
        assert all(int(flat[a]) == expert for a in real)
    assert sorted(a for a in blocks.assignment.tolist() if a < len(flat)) == list(range(len(flat)))


@given(assignments(), st.integers(1, 5))
def test_dispatch_multiply_combine_equals_a_loop_over_tokens(drawn, block_size):
    experts, num_experts = drawn
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(experts), 6, generator=generator)
    weight = torch.randn(num_experts, 5, 6, generator=generator)
    scores = torch.rand(experts.shape, generator=generator)
    blocks = prepare_blocks(*moe_sort(experts, num_experts), block_size)
    rows = dispatch(x, blocks, experts.shape[1])
    product = grouped_gemm(rows, [Linear(w) for w in weight], blocks)
    torch.testing.assert_close(product, grouped_gemm_ref(rows, weight, blocks))
    found = combine(product, scores, blocks)
    expected = torch.stack(
        [
            sum(s * (weight[e] @ token) for e, s in zip(chosen, row, strict=True))
            for token, chosen, row in zip(x, experts, scores, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_fit_the_blocks_are_refused():
    blocks = prepare_blocks(*moe_sort(torch.tensor([[0], [1]]), 2), 1)
    with pytest.raises(ValueError, match="rows"):
        grouped_gemm(torch.zeros(3, 4), [Linear(torch.zeros(4, 4))] * 2, blocks)


def test_correction_bias_changes_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rule = RoutingRule(2, "sigmoid", scaling_factor=2.0)
    bias = torch.tensor([-5.0, 0.0, 0.0, 5.0])
    experts, weights = moe_routing(logits, bias, rule)
    by_expert = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
    assert by_expert == pytest.approx({3: 2 * logits[0, 3].sigmoid().item(), 1: 2 * logits[0, 1].sigmoid().item()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_bias_or_a_logit_that_is_not_finite_never_chooses_in_silence(scoring, value):
    rule = RoutingRule(2, scoring, is_normalised=True)
    for place in ("bias", "logits"):
        logits, bias = torch.randn(3, 6), torch.zeros(6)
        (bias if place == "bias" else logits[1])[4] = value
        experts, weights = moe_routing(logits, bias, rule, num_shared=1)
        assert bool(((experts >= 0) & (experts < 7)).all())
        assert weights[1, :2].isnan().all(), place
        assert weights[0, :2].isfinite().all() == (place == "logits"), "a logit is its token's alone, a bias everyone's"


@pytest.mark.parametrize("is_top2", [False, True])
def test_only_the_best_groups_are_chosen_from(is_top2):
    # Group 0 has the single best expert, group 1 the best pair.
    logits = torch.tensor([[5.0, -5.0, 3.0, 2.9, 0.0, 0.1]])
    rule = RoutingRule(2, "softmax", num_groups=3, num_groups_kept=1, is_group_score_top2=is_top2)
    pair = torch.tensor([[0.5, 0.0, 0.4, 0.4, 0.0, 0.0]]).log().clamp(min=-20)
    experts, _ = moe_routing(pair if is_top2 else logits, None, rule)
    assert sorted(experts[0].tolist()) == ([2, 3] if is_top2 else [0, 1])


def test_normalised_weights_sum_to_the_scaling_factor():
    rule = RoutingRule(3, "softmax", is_normalised=True, scaling_factor=2.5)
    _, weights = moe_routing(torch.randn(7, 8), None, rule)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((7,), 2.5))


def test_routing_wants_float32():
    with pytest.raises(ValueError, match="float32"):
        moe_routing(torch.zeros(1, 4, dtype=torch.bfloat16), None, RoutingRule(1, "softmax"))


def test_silu_mul_is_gated():
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(silu_mul(torch.cat((gate, up), dim=1)), expected)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_equals_plain(rows, has_bias):
    weight = torch.randn(48, 32).bfloat16()
    bias = torch.randn(48).bfloat16() if has_bias else None
    x = torch.randn(rows, 32).bfloat16()
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(Linear(weight, bias)(x), expected, rtol=2e-2, atol=5e-2)


@given(st.integers(1, 5000))
def test_rows_are_padded_to_few_counts(count):
    padded = padded_count(count)
    assert count <= padded < count * 1.25 + 1
    assert padded_count(padded) == padded
    assert len({padded_count(n) for n in range(1, 1025)}) <= 36


def test_experts_in_plain_torch_sort_for_themselves():
    x, norm, num_experts, width = torch.randn(9, 16), torch.ones(16), 4, 8
    gate_up, down = torch.randn(num_experts, 2 * width, 16), torch.randn(num_experts, 16, width)
    router = Router(torch.randn(num_experts, 16), None, RoutingRule(2, "softmax"))
    with use_backend("reference"):
        experts = empty_experts(num_experts, 16, width, x)
        for expert, (both, out) in enumerate(zip(gate_up, down, strict=True)):
            experts.put(expert, both[:width], both[width:], out)
        assert experts.block_size(18) is None
        routed = route_and_sort(x, norm, 1e-6, router, None)
        assert routed.blocks is None
        sorted_too = route_and_sort(x, norm, 1e-6, router, 4)
        assert sorted_too.blocks is not None
        assert torch.equal(routed.experts, sorted_too.experts)
        expected = moe_experts_ref(routed.x, routed.experts, routed.weights, gate_up, down, residual=x)
        torch.testing.assert_close(experts(routed, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", ["some", "none"])
@pytest.mark.parametrize("kernels", ["reference", None])
def test_assignments_of_no_expert_here_contribute_nothing(kernels, kept):
    x, num_experts, width = torch.randn(9, 16), 4, 8
    gate_up, down = torch.randn(num_experts, 2 * width, 16), torch.randn(num_experts, 16, width)
    chosen, weights = torch.randint(0, num_experts, (9, 2)), torch.rand(9, 2)
    is_here = torch.rand(9, 2) < (0.5 if kept == "some" else 0.0)
    chosen[~is_here] = -1
    with use_backend(kernels) if kernels else contextlib.nullcontext():
        experts = empty_experts(num_experts, 16, width, x)
        for expert, (both, out) in enumerate(zip(gate_up, down, strict=True)):
            experts.put(expert, both[:width], both[width:], out)
        found = experts(RoutedTokens(x, chosen, weights, None), x)
    expected = moe_experts_ref(x, chosen, weights, gate_up, down, residual=x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
