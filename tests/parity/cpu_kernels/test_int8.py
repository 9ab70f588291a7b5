"""Weights in 8 bits: linear layers and experts against their specification, and against the numbers they stand for."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.experts import empty_experts
from headrace_kernels.int8_weights import MOST_INPUTS, quantise
from headrace_kernels.linear import Linear
from headrace_kernels.reference import int8_experts, int8_linear
from headrace_kernels.routing_rule import RoutedTokens

from tests.parity.cpu_kernels.inputs import NAN, on_threads, plain, random

EPS = 1e-5
SHAPES = [(1, 16, 16), (1, 1, 1), (3, 33, 50), (7, 15, 17), (13, 64, 31), (530, 40, 24), (2, 9000, 3)]
NEAR = {torch.float32: 1e-3, torch.bfloat16: 2**-7}
"""Of the largest value: a term that lies between two steps may be taken for the other one, by one rounding."""
QUALITY = 0.02
"""Of the norm of a result: what 8 bits cost random weights."""


def assert_close(got, expected):
    assert got.shape == expected.shape
    worst = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
    assert worst <= NEAR[got.dtype], f"relative difference {worst}"


def error(got, expected):
    return float((got.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_form_of_a_linear_layer_is_its_specification(shape, has_bias, dtype):
    num_rows, num_inputs, num_outputs = shape
    weight = plain(num_outputs, num_inputs, dtype=dtype, scale=num_inputs**-0.5)
    bias = plain(num_outputs, dtype=dtype) if has_bias else None
    layer, packed = Linear(weight, bias, is_int8=True), int8_linear.pack(weight)
    x, residual = random(num_rows, num_inputs, dtype=dtype), random(num_rows, num_outputs, dtype=dtype)
    norm = plain(num_inputs, dtype=dtype)
    assert_close(layer(x), int8_linear.packed_linear(x, packed, bias, num_outputs))
    for weights in (norm, None):
        expected = int8_linear.packed_norm_linear(x, weights, packed, EPS, bias, num_outputs)
        assert_close(layer.after_norm(x, weights, EPS), expected)
    assert_close(layer.added_to(residual, x), int8_linear.packed_linear_add(x, packed, residual, bias))


def test_it_stands_for_the_layer_in_numbers(dtype):
    weight, x = plain(300, 200, dtype=dtype), random(20, 200, dtype=dtype)
    expected = x.float() @ weight.float().T
    assert error(Linear(weight, is_int8=True)(x), expected) < QUALITY


def test_the_largest_weights_and_activations_do_not_overflow(dtype):
    weight, x = torch.full((17, 4096), 3.0, dtype=dtype), torch.full((5, 4096), -2.0, dtype=dtype)
    assert error(Linear(weight, is_int8=True)(x), x.float() @ weight.float().T) < 0.005


@pytest.mark.parametrize("form", ["packed", "after_norm", "added_to"])
def test_a_row_is_the_same_in_any_batch_on_any_threads(form, dtype):
    layer, norm = Linear(plain(70, 37, dtype=dtype), plain(70, dtype=dtype), is_int8=True), plain(37, dtype=dtype)
    run = {
        "packed": lambda x, r: layer(x),
        "after_norm": lambda x, r: layer.after_norm(x, norm, EPS),
        "added_to": lambda x, r: layer.added_to(r, x),
    }[form]
    x, residual = random(29, 37, dtype=dtype), random(29, 70, dtype=dtype)
    whole = run(x, residual)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: run(x, residual)), whole)
    for first, end in ((0, 1), (0, 2), (5, 8), (3, 10), (11, 29)):
        assert torch.equal(run(x[first:end], residual[first:end]), whole[first:end])
    for value in (NAN, float("inf"), -float("inf")):
        bad = x.clone()
        bad[4, 36] = value
        out = run(bad, residual)
        assert out[4].isnan().all()
        assert torch.equal(out[:4], whole[:4])
        assert torch.equal(out[5:], whole[5:])


def test_a_row_of_zeros_and_a_weight_of_zeros_are_zeros(dtype):
    weight, x = plain(20, 10, dtype=dtype), random(3, 10, dtype=dtype)
    weight[3], x[1] = 0, 0
    out = Linear(weight, is_int8=True)(x)
    assert not out[1].any()
    assert not out[:, 3].any()


def test_more_inputs_than_sums_hold_are_refused():
    with pytest.raises(ValueError, match="sums of products in 8 bits"):
        Linear(torch.zeros(1, MOST_INPUTS + 1), is_int8=True)


def test_whole_numbers_reach_127_and_never_more():
    values, scales = quantise(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [NAN, 1.0, 2.0]]))
    assert values[:2].tolist() == [[64, -127, 32], [0, 0, 0]]
    assert scales[:2].flatten().tolist() == pytest.approx([2 / 127, 0.0])
    assert scales[2].isnan().all()


@pytest.mark.parametrize(
    "shape", [(1, 64, 32, 8, 2), (1, 1, 1, 1, 1), (5, 70, 33, 6, 3), (7, 17, 15, 4, 4), (600, 24, 16, 9, 4)]
)
def test_experts_are_their_specification(shape, dtype):
    num_tokens, hidden, width, count, num_per_token = shape
    like = torch.empty(0, dtype=dtype)
    layer = empty_experts(count, hidden, width, like, is_int8=True)
    expected = int8_experts.empty(count, hidden, width, like)
    for expert in range(count):
        gate, up = (plain(width, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(2))
        down = plain(hidden, width, dtype=dtype, scale=width**-0.5)
        layer.put(expert, gate, up, down)
        expected.put(expert, gate, up, down)
    experts = torch.rand(num_tokens, count).argsort(dim=1)[:, :num_per_token].contiguous()
    x, residual = (random(num_tokens, hidden, dtype=dtype) for _ in range(2))
    routed = RoutedTokens(x, experts, torch.rand(num_tokens, num_per_token), None)
    whole = layer(routed, residual)
    # What SiLU gives is quantised again: one step of a term more or less.
    assert error(whole, expected(routed, residual).float()) < 0.01
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: layer(routed, residual)), whole)
    last = RoutedTokens(x[-1:], experts[-1:], routed.weights[-1:], None)
    assert torch.equal(layer(last, residual[-1:]), whole[-1:])
