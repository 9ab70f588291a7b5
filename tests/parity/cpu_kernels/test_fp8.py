"""Weights in blocks of FP8: linear layers and experts against what the dequantised weights give in float32."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.block_fp8 import BlockFp8, stacked
from headrace_kernels.cpu import fp8_linear
from headrace_kernels.experts import empty_experts
from headrace_kernels.linear import Linear
from headrace_kernels.reference import fp8_experts
from headrace_kernels.reference import fp8_linear as reference
from headrace_kernels.routing_rule import RoutedTokens

from tests.parity.cpu_kernels.inputs import assert_near, on_threads, plain, random

EPS = 1e-5
BLOCKS = [(128, 128), (16, 10), (20, 12), (3, 300)]
SHAPES = [(1, 16, 16), (1, 1, 1), (3, 33, 50), (6, 127, 17), (7, 129, 15), (13, 64, 31), (49, 260, 40), (530, 40, 24)]


def fp8_weight(num_outputs, num_inputs, block):
    values = (torch.randn(num_outputs, num_inputs) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(-(-num_outputs // block[0]), -(-num_inputs // block[1])) + 0.5) / 60
    return BlockFp8(values, scales * num_inputs**-0.5, block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_form_of_a_linear_layer_is_its_specification(shape, block, dtype):
    num_rows, num_inputs, num_outputs = shape
    weight, bias = fp8_weight(num_outputs, num_inputs, block), plain(num_outputs, dtype=dtype)
    layer = Linear(weight, bias, dtype=dtype)
    assert layer.is_packed
    x, residual = random(num_rows, num_inputs, dtype=dtype), random(num_rows, num_outputs, dtype=dtype)
    norm = plain(num_inputs, dtype=dtype)
    assert_near(layer(x), reference.packed_linear(x.float(), weight, bias, num_outputs))
    for weights in (norm, None):
        expected = reference.packed_norm_linear(x.float(), weights, weight, EPS, bias, num_outputs)
        assert_near(layer.after_norm(x, weights, EPS), expected)
    assert_near(layer.added_to(residual, x), reference.packed_linear_add(x.float(), weight, residual, bias))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_specification_is_a_product_with_the_dequantised_weight(block):
    weight, x = fp8_weight(50, 133, block), torch.randn(4, 133)
    torch.testing.assert_close(reference.packed_linear(x, weight, None, 50), x @ weight.to(torch.float32).T)


def test_every_byte_is_the_number_that_torch_says(dtype):
    """All 254 finite bytes, subnormal ones, too, times one: what comes out is the number, exactly."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()]
    weight = BlockFp8(every[:, None].contiguous(), torch.ones(2, 1), (128, 128))
    for num_rows in (1, 20):
        out = Linear(weight, dtype=dtype)(torch.ones(num_rows, 1, dtype=dtype))
        assert torch.equal(out, every.float().to(dtype).expand(num_rows, -1))


@pytest.mark.parametrize("form", ["packed", "after_norm", "added_to"])
@pytest.mark.parametrize("block", [(128, 128), (5, 9)])
def test_a_row_is_the_same_in_any_batch_on_any_threads(form, block, dtype):
    layer, norm = Linear(fp8_weight(70, 300, block), dtype=dtype), plain(300, dtype=dtype)
    run = {
        "packed": lambda x, r: layer(x),
        "after_norm": lambda x, r: layer.after_norm(x, norm, EPS),
        "added_to": lambda x, r: layer.added_to(r, x),
    }[form]
    x, residual = random(129, 300, dtype=dtype), random(129, 70, dtype=dtype)
    whole = run(x, residual)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: run(x, residual)), whole)
    for first, end in ((0, 1), (0, 2), (5, 12), (3, 20), (11, 100), (48, 97), (128, 129)):
        assert torch.equal(run(x[first:end], residual[first:end]), whole[first:end])
    bad = x.clone()
    bad[4, 99] = float("nan")
    out = run(bad, residual)
    assert out[4].isnan().all()
    assert torch.equal(out[5:], whole[5:])


@pytest.mark.parametrize(("axis", "start", "length"), [(0, 0, 40), (0, 33, 17), (0, 128, 72), (1, 8, 130), (1, 128, 5)])
def test_a_part_of_a_weight_is_the_same_numbers(axis, start, length, dtype):
    """A rank's part, also where it begins within a block."""
    weight = fp8_weight(200, 300, (128, 128))
    part = weight.narrow(axis, start, length)
    expected = weight.to(torch.float32).narrow(axis, start, length)
    assert torch.equal(part.to(torch.float32), expected)
    x = random(3, part.shape[1], dtype=dtype)
    assert_near(Linear(part, dtype=dtype)(x), x.float() @ expected.T)


def test_weights_one_after_another_are_one(dtype):
    """As the indexer's key behind the latent, which ends within a block: blocks of 64 rows."""
    weights = [fp8_weight(rows, 200, (128, 128)) for rows in (256, 192, 130)]
    whole = stacked(weights)
    assert whole.block == (64, 128)
    expected = torch.cat([each.to(torch.float32) for each in weights])
    assert torch.equal(whole.to(torch.float32), expected)
    x = random(8, 200, dtype=dtype)
    assert_near(Linear(whole, dtype=dtype)(x), x.float() @ expected.T)
    with pytest.raises(ValueError, match="blocks of 64 x 128 are not made of 128 x 128"):
        whole.refined((128, 128))


def test_scales_that_are_not_the_weights_are_refused(dtype):
    packed = fp8_linear.pack(fp8_weight(40, 300, (16, 128)), dtype)
    other = fp8_linear.pack(fp8_weight(40, 200, (16, 128)), dtype)
    with pytest.raises(ValueError, match="do not fit 3 panels of 300 terms"):
        fp8_linear.packed_linear(torch.zeros(1, 300, dtype=dtype), packed._replace(scales=other.scales), None, 40)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 64, 32, 8, 2), (128, 128)),
        ((1, 1, 1, 1, 1), (128, 128)),
        ((5, 70, 33, 6, 3), (16, 10)),
        ((7, 200, 136, 4, 4), (128, 128)),
        ((600, 24, 20, 9, 4), (8, 12)),
    ],
)
def test_experts_are_their_specification(shape, block, dtype):
    num_tokens, hidden, width, count, num_per_token = shape
    like = torch.empty(0, dtype=dtype)
    layer = empty_experts(count, hidden, width, like, fp8_blocks=(block, block))
    copied = empty_experts(count, hidden, width, like, fp8_blocks=(block, block))
    expected = fp8_experts.empty(count, hidden, width, like, (block, block))
    for expert in range(count):
        gate, up = (fp8_weight(width, hidden, block) for _ in range(2))
        down = fp8_weight(hidden, width, block)
        layer.put(expert, gate, up, down)
        expected.put(expert, gate, up, down)
    for expert in range(count):
        copied.copy(expert, layer, expert)
    experts = torch.rand(num_tokens, count).argsort(dim=1)[:, :num_per_token].contiguous()
    experts[-1, -1] = -1 if num_tokens > 1 else experts[-1, -1]
    x, residual = (random(num_tokens, hidden, dtype=dtype) for _ in range(2))
    routed = RoutedTokens(x, experts, torch.rand(num_tokens, num_per_token), None)
    whole = layer(routed, residual)
    wide = expected(routed._replace(x=x.float()), residual.float())
    assert_near(whole, wide)
    assert torch.equal(copied(routed, residual), whole)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: layer(routed, residual)), whole)
    last = RoutedTokens(x[-1:], experts[-1:], routed.weights[-1:], None)
    assert torch.equal(layer(last, residual[-1:]), whole[-1:])
