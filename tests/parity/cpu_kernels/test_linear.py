"""Linear layers: packed, as they are, behind a norm, added to a residual."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.decode_linear import linear_add_ref, norm_linear_ref
from headrace_kernels.linear import Linear, linear

from tests.parity.cpu_kernels.inputs import NAN, assert_near, on_threads, plain, random

# T, I, O: one row, odd widths, widths of a lane and one beside it, more rows than a block and than a stage.
SHAPES = [(1, 16, 16), (1, 1, 1), (3, 33, 50), (7, 15, 17), (13, 64, 31), (530, 40, 24), (2, 9000, 3)]
EPS = 1e-5


def layer(num_outputs, num_inputs, dtype, *, has_bias=True):
    weight = plain(num_outputs, num_inputs, dtype=dtype, scale=num_inputs**-0.5)
    bias = plain(num_outputs, dtype=dtype) if has_bias else None
    return Linear(weight, bias), weight.float(), None if bias is None else bias.float()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_form_is_its_specification(shape, has_bias, dtype):
    num_rows, num_inputs, num_outputs = shape
    packed, weight, bias = layer(num_outputs, num_inputs, dtype, has_bias=has_bias)
    assert packed.is_packed
    x, residual = random(num_rows, num_inputs, dtype=dtype), random(num_rows, num_outputs, dtype=dtype)
    norm = plain(num_inputs, dtype=dtype)
    assert_near(packed(x), torch.nn.functional.linear(x.float(), weight, bias))
    assert_near(packed.after_norm(x, norm, EPS), norm_linear_ref(x.float(), norm.float(), weight, EPS, bias))
    assert_near(packed.after_norm(x, None, EPS), norm_linear_ref(x.float(), None, weight, EPS, bias))
    assert_near(packed.added_to(residual, x), linear_add_ref(x.float(), weight, residual.float(), bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_weight_is_read_where_it_lies(shape, dtype):
    num_rows, num_inputs, num_outputs = shape
    x, bias = random(num_rows, num_inputs, dtype=dtype), plain(num_outputs, dtype=dtype)
    weight = random(num_outputs, num_inputs, dtype=dtype, scale=num_inputs**-0.5)
    assert_near(linear(x, weight, bias), torch.nn.functional.linear(x.float(), weight.float(), bias.float()))
    assert_near(linear(x.T.contiguous().T, weight), torch.nn.functional.linear(x.float(), weight.float()))


def test_no_rows_are_no_rows(dtype):
    packed, weight, _ = layer(5, 7, dtype)
    x = torch.empty(0, 7, dtype=dtype)
    results = packed(x), packed.after_norm(x, None, EPS), packed.added_to(torch.empty(0, 5, dtype=dtype), x)
    assert [each.shape for each in (*results, linear(x, weight.to(dtype)))] == [(0, 5)] * 4


def forms(packed, weight, norm):
    return {
        "packed": lambda x, r: packed(x),
        "after_norm": lambda x, r: packed.after_norm(x, norm, EPS),
        "added_to": lambda x, r: packed.added_to(r, x),
        "plain": lambda x, r: linear(x, weight),
    }


@pytest.mark.parametrize("form", ["packed", "after_norm", "added_to", "plain"])
def test_a_row_is_the_same_in_any_batch_on_any_threads(form, dtype):
    packed, weight, _ = layer(70, 37, dtype)
    run = forms(packed, weight.to(dtype), plain(37, dtype=dtype))[form]
    x, residual = random(29, 37, dtype=dtype), random(29, 70, dtype=dtype)
    whole = run(x, residual)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: run(x, residual)), whole)
    for first, end in ((0, 1), (0, 2), (5, 8), (3, 10), (11, 29)):
        assert torch.equal(run(x[first:end], residual[first:end]), whole[first:end])


@pytest.mark.parametrize("form", ["packed", "after_norm", "added_to", "plain"])
def test_a_row_of_nan_stays_in_its_row(form, dtype):
    packed, weight, _ = layer(70, 37, dtype)
    run = forms(packed, weight.to(dtype), plain(37, dtype=dtype))[form]
    x, residual = random(9, 37, dtype=dtype), random(9, 70, dtype=dtype)
    whole = run(x, residual)
    for value in (NAN, float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[4, 36] = value
        out = run(spoilt, residual)
        assert not out[4].isfinite().any()
        assert torch.equal(out[[0, 1, 2, 3, 5, 6, 7, 8]], whole[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", ["weight", "bias", "norm", "residual"])
def test_what_is_not_finite_in_a_weight_shows(spoilt, value, dtype):
    held = {"weight": plain(35, 37, dtype=dtype), "bias": plain(35, dtype=dtype), "norm": plain(37, dtype=dtype)}
    held["residual"], x = random(3, 35, dtype=dtype), plain(3, 37, dtype=dtype)
    held[spoilt][..., -1] = value
    packed = Linear(held["weight"], held["bias"])
    results = {
        "packed": packed(x),
        "plain": linear(x, held["weight"], held["bias"]),
        "after_norm": packed.after_norm(x, held["norm"], EPS),
        "added_to": packed.added_to(held["residual"], x),
    }
    only = {"norm": ["after_norm"], "residual": ["added_to"]}.get(spoilt, list(results))
    for form, result in results.items():
        assert result[:, -1].isfinite().all() == (form not in only), form


def test_what_does_not_fit_is_refused_before_memory_is_read(dtype):
    packed, weight, _ = layer(5, 8, dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    x = plain(2, 8, dtype=dtype)
    for call in (
        lambda: packed(plain(2, 9, dtype=dtype)),
        lambda: Linear(weight.to(dtype), plain(4, dtype=dtype)),
        lambda: Linear(weight.to(dtype), plain(5, dtype=other)),
        lambda: Linear(weight.to(dtype), plain(10, dtype=dtype)[::2]),
        lambda: packed(x.to(other)),
        lambda: packed.after_norm(x, plain(7, dtype=dtype), EPS),
        lambda: packed.added_to(plain(2, 4, dtype=dtype), x),
        lambda: packed.added_to(plain(1, 5, dtype=dtype), x),
        lambda: linear(plain(2, 9, dtype=dtype), weight.to(dtype)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()
