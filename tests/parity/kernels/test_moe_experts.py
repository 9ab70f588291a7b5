"""A layer's experts against their specification: few tokens and many, shards, shared experts."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.fp8_groups import FP8
from headrace_kernels.gpu import configs
from headrace_kernels.gpu.moe_experts import DEFAULT
from headrace_kernels.moe_experts import FEW_TOKENS, best_block_size, fold_shared, moe_experts, moe_experts_ref
from headrace_kernels.moe_routing import moe_routing
from headrace_kernels.routing_rule import RoutingRule

from tests.parity.kernels.moe_cases import activations, blocks_of, gate_up_weight, nan_empty, routing, weight

NAN = float("nan")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    nan_empty(monkeypatch)


@pytest.fixture(autouse=True)
def large_tiles():
    """Few programs: what the interpreter takes is by the program."""
    with configs.use_config("moe_experts", {"BLOCK_O": 32, "BLOCK_K": 128, "STAGES": 2, "num_warps": 4}):
        yield


def stacks(num_experts, width, hidden, dtype, device):
    """Gate and up, down, scales."""
    gate_up, gate_up_scale = gate_up_weight(num_experts, width, hidden, dtype, device)
    down, down_scale = weight((num_experts, hidden, width), dtype, device)
    return gate_up, down, None if gate_up_scale is None else (gate_up_scale, down_scale)


# Activations in fp8, for many tokens, have three bits of mantissa: the specification keeps theirs.
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "width", "dtype", "tolerance"),
    [
        (1, 50, 33, torch.float32, 1e-4),
        (3, 50, 33, torch.bfloat16, 3e-2),
        (2, 136, 130, FP8, 3e-2),
        (5, 50, 33, torch.float32, 1e-4),
        (9, 50, 33, torch.bfloat16, 3e-2),
        (6, 136, 130, FP8, 0.15),
    ],
)
@pytest.mark.parametrize("has_residual", [False, True])
def test_equals_the_specification(num_tokens, hidden, width, has_residual, dtype, tolerance, device):
    experts, weights = routing(num_tokens, 3, 4, device)
    gate_up, down, scales = stacks(4, width, hidden, dtype, device)
    x = activations(num_tokens, hidden, dtype, device)
    residual = activations(num_tokens, hidden, dtype, device) if has_residual else None
    out = moe_experts(x, experts, weights, gate_up, down, residual=residual, scales=scales)
    expected = moe_experts_ref(x, experts, weights, gate_up, down, residual=residual, scales=scales)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_fp8_rows_quantised_once_give_what_rows_quantised_in_the_kernel_give(device):
    experts, weights = routing(6, 2, 3, device)
    gate_up, down, scales = stacks(3, 40, 136, FP8, device)
    x = activations(6, 136, FP8, device)
    outs = [
        moe_experts(x, experts, weights, gate_up, down, blocks=blocks_of(experts, 3, size), scales=scales)
        for size in (32, 64)
    ]
    torch.testing.assert_close(*outs, rtol=1e-2, atol=1e-2)


def test_one_token_of_the_width_of_deepseek_v2_lite_at_its_real_length_of_tiles(device):
    experts, weights = routing(1, 1, 1, device)
    gate_up, down, _ = stacks(1, 1408, 16, torch.bfloat16, device)
    x = activations(1, 16, torch.bfloat16, device)
    with configs.use_config("moe_experts", {**DEFAULT, "BLOCK_O": 64}):
        out = moe_experts(x, experts, weights, gate_up, down)
    expected = moe_experts_ref(x, experts, weights, gate_up, down)
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_without_a_gpu_plain_torch_gives_the_same(dtype, device):
    experts, weights = routing(5, 2, 6, device)
    gate_up, down, scales = stacks(4, 40, 136, dtype, device)
    x = activations(5, 136, dtype, device)
    with use_backend("reference"):
        out = moe_experts(x, experts, weights, gate_up, down, first_local=1, num_experts=6, scales=scales)
    expected = moe_experts_ref(x, experts, weights, gate_up, down, first_local=1, scales=scales)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS, 6])
@pytest.mark.parametrize("dtype", [torch.float32, FP8])
def test_shards_read_only_their_experts_and_add_up_to_the_layer(num_tokens, dtype, device):
    experts, weights = routing(num_tokens, 3, 8, device)
    experts[0] = torch.tensor([0, 1, -1])  # nothing for the last shard, and an assignment that is none
    weights[0, 2] = NAN
    gate_up, down, scales = stacks(8, 48, 64, dtype, device)
    x = activations(num_tokens, 64, dtype, device)
    total = torch.zeros(num_tokens, 64, device=device)
    for local in (range(3), range(3, 8)):
        mine = slice(local.start, local.stop)
        total += moe_experts(
            x,
            experts,
            weights,
            gate_up[mine],
            down[mine],
            first_local=local.start,
            num_experts=8,
            scales=None if scales is None else (scales[0][mine], scales[1][mine]),
        ).float()
    expected = moe_experts_ref(x, experts, weights, gate_up, down, scales=scales).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_tokens", [2, 6])
def test_without_a_local_expert_only_the_residual_is_left(num_tokens, device):
    experts = torch.full((num_tokens, 2), -1, dtype=torch.int32, device=device)
    weights = torch.full((num_tokens, 2), NAN, device=device)
    gate_up, down = (torch.full(shape, NAN, device=device) for shape in ((3, 32, 16), (3, 16, 16)))
    x, residual = (torch.randn(num_tokens, 16, device=device) for _ in range(2))
    assert torch.equal(moe_experts(x, experts, weights, gate_up, down, residual=residual), residual)
    assert not moe_experts(x, experts, weights, gate_up, down).any()


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS, 18])
def test_a_token_does_not_depend_on_the_others(num_tokens, device):
    experts, weights = routing(num_tokens, 2, 3, device)
    gate_up, down, _ = stacks(3, 48, 64, torch.float32, device)
    x = torch.randn(num_tokens, 64, device=device)
    is_few = num_tokens <= FEW_TOKENS

    def run(tokens: slice):
        blocks = None if is_few else blocks_of(experts[tokens], 3)
        return moe_experts(x[tokens], experts[tokens], weights[tokens], gate_up, down, blocks=blocks)

    whole = run(slice(None))
    for token in (0, num_tokens - 1):
        assert torch.equal(run(slice(token, token + 1))[0], whole[token])


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_experts_folded_in_equal_routed_plus_shared(num_tokens, num_shared, device):
    gate_up, down, _ = stacks(4, 24, 40, torch.float32, device)
    shared_gate_up = torch.randn(2 * num_shared * 24, 40, device=device) / 6
    shared_down = torch.randn(40, num_shared * 24, device=device) / 6
    x = torch.randn(num_tokens, 40, device=device)
    logits = torch.randn(num_tokens, 4, device=device)
    rule = RoutingRule(2, "softmax")
    routed = moe_experts_ref(x, *moe_routing(logits, None, rule), gate_up, down)
    gate, up = (x @ shared_gate_up.t()).chunk(2, dim=1)
    expected = routed + (torch.nn.functional.silu(gate) * up) @ shared_down.t()
    folded = fold_shared(gate_up, down, shared_gate_up, shared_down)
    out = moe_experts(x, *moe_routing(logits, None, rule, num_shared), *folded)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_scales_are_folded_by_the_same_call(device):
    gate_up, down, scales = stacks(2, 128, 256, FP8, device)
    assert scales is not None
    wide_gate_up, wide_down, wide_scales = stacks(1, 256, 256, FP8, device)
    assert wide_scales is not None
    folded = fold_shared(gate_up, down, wide_gate_up[0], wide_down[0])
    folded_scales = fold_shared(*scales, wide_scales[0][0], wide_scales[1][0])
    x = activations(3, 256, FP8, device)
    experts, ones = torch.tensor([[2, 3]] * 3, device=device), torch.ones(3, 2, device=device)
    expected = moe_experts_ref(x, experts[:, :1] * 0, ones[:, :1], wide_gate_up, wide_down, scales=wide_scales)
    out = moe_experts(x, experts, ones, *folded, scales=folded_scales)
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


def test_no_tokens(device):
    gate_up, down, _ = stacks(2, 16, 32, torch.bfloat16, device)
    experts, weights = routing(0, 2, 2, device)
    x = torch.zeros((0, 32), dtype=torch.bfloat16, device=device)
    assert moe_experts(x, experts, weights, gate_up, down).shape == (0, 32)


@pytest.mark.parametrize(
    ("num_assignments", "num_experts", "expected"),
    [(1, 64, 16), (1024, 64, 16), (1025, 64, 32), (32 * 64 + 1, 64, 64), (10**6, 8, 128)],
)
def test_blocks_have_an_experts_share_of_the_rows(num_assignments, num_experts, expected):
    assert best_block_size(num_assignments, num_experts) == expected


def test_what_does_not_fit_is_refused(device):
    gate_up, down, _ = stacks(2, 16, 32, torch.float32, device)
    experts, weights = routing(3, 2, 2, device)
    x = torch.zeros(3, 32, device=device)
    with pytest.raises(ValueError, match="x "):
        moe_experts(x.bfloat16(), experts, weights, gate_up, down)
    with pytest.raises(ValueError, match="do not fit each other"):
        moe_experts(x, experts, weights, gate_up[:, :30].contiguous(), down)
    with pytest.raises(ValueError, match="residual"):
        moe_experts(x, experts, weights, gate_up, down, residual=x[:2])
    with pytest.raises(ValueError, match="float32"):
        moe_experts(x, experts, weights.double(), gate_up, down)
    with pytest.raises(ValueError, match="scales for float8"):
        moe_experts(x, experts, weights, gate_up, down, scales=(weights, weights))
    with pytest.raises(ValueError, match="do not fit"):
        fold_shared(gate_up, down, gate_up[0], down[0, :, :5])
    with pytest.raises(ValueError, match="routed experts are"):
        fold_shared(gate_up, down, gate_up[0].bfloat16(), down[0].bfloat16())
