"""The router and the experts of a layer."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.experts import empty_experts
from headrace_kernels.moe_experts import moe_experts_ref
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.moe_routing import moe_routing_ref
from headrace_kernels.rms_norm import rms_norm_ref
from headrace_kernels.routing_rule import RoutedTokens, Router, RoutingRule

from tests.parity.cpu_kernels.inputs import NAN, assert_near, on_threads, plain, random

# T, N hidden, I width, E experts, K per token: one expert, all of them, odd widths, more tokens than a stage.
SHAPES = [
    (1, 64, 32, 8, 2),
    (1, 1, 1, 1, 1),
    (5, 70, 33, 6, 3),
    (7, 17, 15, 4, 4),
    (3, 32, 16, 1, 1),
    (600, 24, 16, 9, 4),
]
RULES = {
    "softmax": RoutingRule(2, "softmax"),
    "softmax, normalised": RoutingRule(4, "softmax", is_normalised=True, scaling_factor=0.5),
    "sigmoid, groups": RoutingRule(
        3, "sigmoid", 4, 2, is_group_score_top2=True, is_normalised=True, scaling_factor=2.5
    ),
    "best of groups": RoutingRule(2, "softmax", 4, 3),
    "all": RoutingRule(12, "sigmoid"),
}


class Layer:
    def __init__(self, hidden, width, count, dtype):
        gate, up = (plain(count, width, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(2))
        down = plain(count, hidden, width, dtype=dtype, scale=width**-0.5)
        self.held = empty_experts(count, hidden, width, down)
        for expert in range(count):
            self.held.put(expert, gate[expert], up[expert], down[expert])
        self.gate_up, self.down = torch.cat((gate, up), dim=1).float(), down.float()

    def __call__(self, x, experts, weights, residual):
        return self.held(RoutedTokens(x, experts, weights, None), residual)

    def specification(self, x, experts, weights, residual):
        return moe_experts_ref(x.float(), experts, weights, self.gate_up, self.down, residual=residual.float())


def tokens(num_tokens, hidden, num_experts, num_per_token, dtype):
    experts = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :num_per_token].contiguous()
    x, residual = (random(num_tokens, hidden, dtype=dtype) for _ in range(2))
    return x, experts, torch.rand(num_tokens, num_per_token), residual


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_their_specification(shape, dtype):
    num_tokens, hidden, width, count, num_per_token = shape
    layer, inputs = Layer(hidden, width, count, dtype), tokens(num_tokens, hidden, count, num_per_token, dtype)
    assert_near(layer(*inputs), layer.specification(*inputs))


@pytest.mark.parametrize("outside", [-1, 6, 2**40, -(2**40)])
def test_experts_that_are_not_here_add_nothing(outside, dtype):
    layer, inputs = Layer(40, 24, 6, dtype), tokens(9, 40, 6, 3, dtype)
    inputs[1][4, 1] = inputs[1][6] = outside
    out = layer(*inputs)
    assert_near(out, layer.specification(*inputs))
    assert torch.equal(out[6], inputs[3][6]), "a token of no expert is its residual"
    inputs[1][:] = outside
    assert torch.equal(layer(*inputs), inputs[3])


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_a_copied_expert_is_the_expert(kernels, is_int8, dtype):
    with use_backend(kernels):
        held, other = (empty_experts(4, 40, 24, torch.empty(0, dtype=dtype), is_int8=is_int8) for _ in range(2))
        for expert in range(4):
            shapes = ((24, 40), (24, 40), (40, 24))
            held.put(expert, *(plain(*shape, dtype=dtype) for shape in shapes))
            other.put(expert, *(plain(*shape, dtype=dtype) for shape in shapes))
        (x, experts, weights, residual), took = tokens(9, 40, 4, 2, dtype), {0: 3, 1: 0, 2: 0, 3: 2}
        for number, its in took.items():
            other.copy(number, held, its)
        want = held(RoutedTokens(x, torch.tensor([took[int(e)] for e in experts.flatten()]).view(9, 2), weights, None),
                    residual)  # fmt: skip
        assert_near(other(RoutedTokens(x, experts, weights, None), residual), want.float())


def test_no_tokens_are_no_tokens(dtype):
    layer = Layer(40, 24, 6, dtype)
    none = torch.empty(0, 40, dtype=dtype)
    assert layer(none, torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3), none).shape == (0, 40)


def test_a_token_is_the_same_in_any_batch_on_any_threads(dtype):
    layer, inputs = Layer(50, 24, 5, dtype), tokens(61, 50, 5, 3, dtype)
    whole = layer(*inputs)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: layer(*inputs)), whole)
    for first, end in ((0, 1), (4, 6), (3, 10), (13, 61)):
        assert torch.equal(layer(*(each[first:end] for each in inputs)), whole[first:end])


def test_a_token_s_choices_may_come_in_any_order(dtype):
    layer, (x, experts, weights, residual) = Layer(50, 24, 5, dtype), tokens(7, 50, 5, 3, dtype)
    turned = layer(x, experts.flip(1).contiguous(), weights.flip(1).contiguous(), residual)
    assert torch.equal(layer(x, experts, weights, residual), turned)


def test_experts_nobody_chose_are_not_read_and_a_token_of_nan_stays_alone(dtype):
    layer, inputs = Layer(50, 24, 5, dtype), tokens(9, 50, 5, 3, dtype)
    inputs[1][inputs[1] == 2] = -1
    layer.held.put(2, *(torch.full(shape, NAN, dtype=dtype) for shape in ((24, 50), (24, 50), (50, 24))))
    whole = layer(*inputs)
    assert whole.isfinite().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    inputs[1][4] = torch.tensor([0, 1, 3])
    for value in (NAN, float("inf"), -float("inf")):
        inputs[0][4, 49] = value
        out = layer(*inputs)
        assert not out[4].isfinite().any()
        assert torch.equal(out[others], whole[others])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", ["gate", "up", "down", "weights", "residual"])
def test_what_is_not_finite_in_a_weight_shows(spoilt, value, dtype):
    layer, inputs = Layer(40, 24, 2, dtype), tokens(3, 40, 2, 2, dtype)
    gate, up = layer.gate_up[1].to(dtype).chunk(2)
    held = {"gate": gate, "up": up, "down": layer.down[1].to(dtype), "weights": inputs[2], "residual": inputs[3]}
    held[spoilt][-1, -1] = value
    layer.held.put(1, gate, up, held["down"])
    out = layer(*inputs)
    assert not out[2, -1].isfinite()
    if spoilt in ("weights", "residual"):
        assert out[:2].isfinite().all()


def test_tensors_that_do_not_fit_are_refused(dtype):
    layer, (x, experts, weights, residual) = Layer(40, 24, 6, dtype), tokens(9, 40, 6, 3, dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for wrong in (
        (x.to(other), experts, weights, residual),
        (x[:, :39], experts, weights, residual),
        (x, experts.int(), weights, residual),
        (x, experts[:8], weights, residual),
        (x, experts, weights.double(), residual),
        (x, experts, weights, residual[:8]),
        (x, experts, weights, residual.to(other)),
    ):
        with pytest.raises(ValueError, match="fit"):
            layer(*wrong)


def router_of(rule, hidden, count, num_shared=0, *, has_bias=True):
    bias = torch.randn(count) * 0.1 if has_bias else None
    return Router(torch.randn(count, hidden) * hidden**-0.5, bias, rule, num_shared)


def assert_routed_alike(got, experts, weights):
    order, expected_order = got.experts.argsort(dim=1), experts.argsort(dim=1)
    assert torch.equal(got.experts.gather(1, order), experts.gather(1, expected_order))
    difference = got.weights.gather(1, order) - weights.gather(1, expected_order)
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("name", RULES)
def test_the_router_is_its_specification(name, num_shared, dtype):
    router = router_of(RULES[name], 37, 12, num_shared, has_bias=name != "softmax")
    x, norm = random(11, 37, dtype=dtype), plain(37, dtype=dtype)
    slots = torch.arange(11)
    slots[3] = -1
    got = route_and_sort(x, norm, 1e-5, router, 1, slot_mapping=slots)
    assert_near(got.x, rms_norm_ref(x.float(), norm.float(), 1e-5))
    # What the experts get, rounded, is what the router sees.
    experts, weights = moe_routing_ref(got.x.float() @ router.weight.T, router.bias, router.rule, num_shared)
    experts[3], weights[3] = -1, 0.0
    assert_routed_alike(got, experts, weights)
    assert got.experts[3].eq(-1).all()
    assert got.weights[3].eq(0).all()


def test_one_expert_is_everybody_s(dtype):
    router = router_of(RoutingRule(1, "softmax"), 9, 1)
    got = route_and_sort(random(3, 9, dtype=dtype), plain(9, dtype=dtype), 1e-5, router, 1)
    assert got.experts.tolist() == [[0]] * 3
    assert got.weights.tolist() == [[1.0]] * 3


def test_no_tokens_are_routed_nowhere(dtype):
    router = router_of(RULES["softmax"], 9, 4)
    got = route_and_sort(torch.empty(0, 9, dtype=dtype), plain(9, dtype=dtype), 1e-5, router, 1)
    assert (got.experts.shape, got.weights.shape, got.x.shape) == ((0, 2), (0, 2), (0, 9))


@pytest.mark.parametrize("name", RULES)
def test_a_token_is_routed_alike_in_any_batch_on_any_threads(name, dtype):
    router, x, norm = router_of(RULES[name], 37, 12), random(23, 37, dtype=dtype), plain(37, dtype=dtype)

    def run(rows):
        return route_and_sort(rows, norm, 1e-5, router, 1)[:3]

    whole = run(x)
    for threads in (1, 2, 3):
        assert all(map(torch.equal, on_threads(threads, lambda: run(x)), whole))
    for first, end in ((0, 1), (4, 6), (10, 23)):
        assert all(torch.equal(got, all_of[first:end]) for got, all_of in zip(run(x[first:end]), whole, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_a_token_of_nan_has_weights_of_nan_alone(name, dtype):
    router, x, norm = router_of(RULES[name], 37, 12), random(5, 37, dtype=dtype), plain(37, dtype=dtype)
    whole = route_and_sort(x, norm, 1e-5, router, 1)
    x[2, 36] = NAN
    got = route_and_sort(x, norm, 1e-5, router, 1)
    assert not got.weights[2].isfinite().any()
    assert got.experts[2].ge(0).all()
    assert got.experts[2].lt(12).all()
    assert torch.equal(got.weights[[0, 1, 3, 4]], whole.weights[[0, 1, 3, 4]])


def test_a_router_s_bias_of_another_dtype_is_refused(dtype):
    router = router_of(RULES["softmax"], 9, 4)
    router = Router(router.weight, torch.zeros(4, dtype=torch.float64), router.rule)
    with pytest.raises(ValueError, match="bias"):
        route_and_sort(plain(2, 9, dtype=dtype), plain(9, dtype=dtype), 1e-5, router, 1)
