"""Norm, router, routing and sorting in one launch, against the four steps.

The interpreter runs one program after another, so what it cannot show is a race; gpu/moe_router.py argues that there is
none.
"""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.aot.cases.moe_routing import MODEL_RULES
from headrace_kernels.gpu import moe_router as gpu
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.moe_routing import moe_routing_ref
from headrace_kernels.moe_sort import sort_blocks_ref
from headrace_kernels.rms_norm import rms_norm_ref
from headrace_kernels.routing_rule import Router, RoutingRule

RULE = RoutingRule(2, "softmax", is_normalised=True)


def make_router(num_experts, width, device, rule=RULE, num_shared=0):
    bias = torch.rand(num_experts, device=device) * 0.1 if rule.scoring == "sigmoid" else None
    return Router(torch.randn(num_experts, width, device=device) / width**0.5, bias, rule, num_shared)


def assert_routed(found, x, norm_weight, router, block_size, first_local, num_local):
    """Each step against its specification, given what the step before it found."""
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.x, rms_norm_ref(x, norm_weight, 1e-5), rtol=tolerance, atol=tolerance)
    logits = found.x.float() @ router.weight.T
    experts, weights = moe_routing_ref(logits, router.bias, router.rule, router.num_shared)
    for row in range(len(x)):
        expected = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        by_expert = dict(zip(found.experts[row].tolist(), found.weights[row].tolist(), strict=True))
        assert by_expert == pytest.approx(expected, rel=1e-4)
    num_experts = len(router.weight) + router.num_shared
    blocks = sort_blocks_ref(found.experts, num_experts, block_size, first_local=first_local, num_local=num_local)
    for name in ("assignment", "block_expert", "num_blocks", "counts"):
        assert torch.equal(getattr(found.blocks, name), getattr(blocks, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "width", "num_experts", "num_shared"), [(1, 40, 5, 0), (5, 300, 6, 2), (18, 33, 20, 1), (0, 16, 4, 0)]
)
def test_equals_the_four_steps(num_rows, width, num_experts, num_shared, dtype, device):
    x, norm_weight = torch.randn(num_rows, width, device=device).to(dtype), torch.rand(width, device=device).to(dtype)
    router = make_router(num_experts, width, device, num_shared=num_shared)
    found = route_and_sort(x, norm_weight, 1e-5, router, 4)
    assert_routed(found, x, norm_weight, router, 4, 0, num_experts + num_shared)


def test_a_real_layer(device):
    """DeepSeek-V3's rule and experts, a shard of them here; fewer columns."""
    rule, num_experts, num_shared = MODEL_RULES["V3"]
    x, norm_weight = torch.randn(3, 256, device=device), torch.rand(256, device=device)
    router = make_router(num_experts, 256, device, rule, num_shared)
    found = route_and_sort(x, norm_weight, 1e-5, router, 16, first_local=32, num_local=96)
    assert_routed(found, x, norm_weight, router, 16, 32, 96)


def test_a_launch_leaves_the_counters_as_it_found_them(device):
    """Twice the same, and different sizes in between; NaN beside the rows."""
    router = make_router(6, 48, device)
    wide = torch.full((35, 64), float("nan"), device=device)
    wide[:, 8:56] = torch.randn(35, 48, device=device)
    norm_weight = torch.rand(48, device=device)
    first = route_and_sort(wide[:3, 8:56], norm_weight, 1e-5, router, 2)
    whole = route_and_sort(wide[:, 8:56], norm_weight, 1e-5, router, 2)
    again = route_and_sort(wide[:3, 8:56], norm_weight, 1e-5, router, 2)
    assert_routed(whole, wide[:, 8:56], norm_weight, router, 2, 0, 6)
    for name in ("x", "experts", "weights"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        # A row does not depend on the batch.
        assert torch.equal(getattr(first, name), getattr(whole, name)[:3])
    assert torch.equal(first.blocks.assignment, again.blocks.assignment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_how_many_there_are(dtype, device):
    """Bit for bit, though one token, a few and many have tiles of their own; more columns than are squared at once."""
    router, norm_weight = make_router(40, 1100, device), torch.rand(1100, device=device).to(dtype)
    x = torch.randn(19, 1100, device=device).to(dtype)
    whole = route_and_sort(x, norm_weight, 1e-5, router, 2)
    for num_rows in (1, 3, 16):
        part = route_and_sort(x[:num_rows], norm_weight, 1e-5, router, 2)
        for name in ("x", "experts", "weights"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:num_rows]), (name, num_rows)


def test_a_nan_spoils_the_weights_of_its_token_alone(device):
    router, norm_weight = make_router(6, 32, device), torch.rand(32, device=device)
    x = torch.randn(3, 32, device=device)
    x[1, 5] = float("nan")
    found = route_and_sort(x, norm_weight, 1e-5, router, 2)
    assert found.weights[1].isnan().all()
    assert found.weights[[0, 2]].isfinite().all()
    assert int(found.blocks.counts.sum()) == 6


@pytest.mark.parametrize("fused_rows", [0, 64])
def test_padding_has_no_experts(fused_rows, device, monkeypatch):
    """As in a CUDA graph's batch; what the padded rows hold, NaN here, touches no other row."""
    monkeypatch.setattr(gpu, "FUSED_ROWS", fused_rows)
    router, norm_weight = make_router(6, 32, device, num_shared=1), torch.rand(32, device=device)
    x = torch.randn(5, 32, device=device)
    alone = route_and_sort(x[:3], norm_weight, 1e-5, router, 2)
    x[3:] = float("nan")
    slots = torch.tensor([4, 0, 9, -1, -1], device=device)
    found = route_and_sort(x, norm_weight, 1e-5, router, 2, slot_mapping=slots)
    assert torch.equal(found.experts[:3], alone.experts)
    torch.testing.assert_close(found.weights[:3], alone.weights)
    assert (found.experts[3:] == -1).all()
    assert (found.weights[3:] == 0).all()
    assert torch.equal(found.blocks.counts, alone.blocks.counts)
    assert torch.equal(found.blocks.num_blocks, alone.blocks.num_blocks)


def test_many_tokens_take_the_four_steps(device, monkeypatch):
    monkeypatch.setattr(gpu, "FUSED_ROWS", 2)
    x, norm_weight = torch.randn(3, 16, device=device), torch.rand(16, device=device)
    router = make_router(4, 16, device)
    assert_routed(route_and_sort(x, norm_weight, 1e-5, router, 2), x, norm_weight, router, 2, 0, 4)


def test_the_reference_backend_gives_the_same(device):
    x, norm_weight = torch.randn(4, 16, device=device), torch.rand(16, device=device)
    router = make_router(4, 16, device, num_shared=1)
    with use_backend("reference"):
        found = route_and_sort(x, norm_weight, 1e-5, router, 2)
    assert_routed(found, x, norm_weight, router, 2, 0, 5)


def test_what_does_not_fit_is_refused(device):
    x, norm_weight, router = torch.randn(2, 8, device=device), torch.rand(8, device=device), make_router(4, 8, device)
    bad_calls = [
        lambda: route_and_sort(x[:, :4], norm_weight, 1e-5, router, 2),
        lambda: route_and_sort(x.half(), norm_weight.half(), 1e-5, router, 2),
        lambda: route_and_sort(x, norm_weight, 1e-5, Router(router.weight.bfloat16(), None, RULE), 2),
        lambda: route_and_sort(x, norm_weight, 1e-5, Router(router.weight, None, RULE, -1), 2),
        lambda: route_and_sort(x, norm_weight, 1e-5, Router(router.weight, None, RoutingRule(5, "softmax")), 2),
        lambda: route_and_sort(x, norm_weight, 1e-5, router, 2, first_local=3, num_local=2),
        lambda: route_and_sort(x, norm_weight, 1e-5, router, 2, slot_mapping=torch.zeros(3, dtype=torch.int64)),
    ]
    for call in bad_calls:
        with pytest.raises(ValueError, match=r"fit|must|not negative|experts"):
            call()
