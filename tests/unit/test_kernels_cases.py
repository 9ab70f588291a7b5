"""The benchmark's cases without a GPU: their inputs, how many buffers take turns, their floors."""

import importlib

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.gpu.launch import recording

from tests.perf.kernels import moe_experts, moe_router
from tests.perf.kernels.bench_case import buffers_at_most, num_buffers
from tests.perf.kernels.ceilings import H200_ASSUMED
from tests.perf.kernels.harness import family_modules
from tests.perf.kernels.rows import fits_l2, unmeasured
from tests.perf.kernels.stand_in import InsteadOfCuda

H200_L2_BYTES = 60 * 2**20
_TINY_BYTES = 150e3


def test_inputs_are_made_elsewhere_than_on_a_gpu():
    with InsteadOfCuda("meta"):
        made = [torch.randn(2, 3, device="cuda"), torch.zeros(2).cuda(), torch.full((2,), 1.0, device="cuda")]
        assert {each.device.type for each in made} == {"meta"}
        assert torch.zeros(2).device.type == "cpu"


def test_buffers_exceed_the_cache_twice_where_a_case_is_not_tiny():
    assert num_buffers(2.0**30) == 2
    assert num_buffers(1e6) == 256
    assert num_buffers(1e3) == 1024
    with buffers_at_most(3):
        assert num_buffers(1e6) == 3


@pytest.mark.parametrize("module", family_modules())
def test_only_what_is_tiny_stays_in_the_cache(module, monkeypatch):
    """Up to twice 60 MiB by 1024 buffers; a kernel that moves less is bound by its launch."""
    family = importlib.import_module(module)
    asked = []
    if hasattr(family, "num_buffers"):
        monkeypatch.setattr(family, "num_buffers", lambda bytes_of_one: asked.append(num_buffers(bytes_of_one)) or 1)
    for case in family.cases():
        if case.bytes_moved < _TINY_BYTES or unmeasured(case, H200_ASSUMED).bound != "bytes":
            continue
        with InsteadOfCuda("meta"), use_backend("triton"), recording("cuda"):
            made = len(case.calls())
        assert not fits_l2(case, asked.pop() if asked else made, H200_L2_BYTES, "bytes"), case


def test_experts_floor_counts_routing_and_the_residual():
    """Two tokens of a layer where each chooses both experts: tokens, residuals, results; ids and weights."""
    layer = moe_experts.Layer("small", 128, 256, 2, 2, 2, torch.bfloat16, {})
    case = moe_experts._case(layer, 2)
    weights = 2 * 3 * 128 * 256 * 2
    assert case.bytes_moved == weights + 3 * (2 * 128 * 2) + 2 * 2 * (8 + 4)
    assert list(case.peers) == ["torch._grouped_mm and index kernels"]


def test_fp8_experts_floor_counts_their_scales():
    layer = moe_experts.Layer("small", 128, 256, 2, 2, 2, torch.float8_e4m3fn, {})
    assert layer.expert_bytes == 3 * 128 * 256 + 4 * 3 * 2


def test_the_routers_products_have_no_matrix_units():
    case = moe_router._case("V3", 64)
    assert (case.ceiling, case.flops) == ("fp32", 2 * 64 * 256 * 7168)


def test_a_shard_sorts_for_all_experts(monkeypatch):
    """As in a worker, where blocks are as large as an expert's share of all tokens."""
    seen = {}
    monkeypatch.setattr(moe_experts, "moe_experts", lambda *_, **options: seen.update(options))
    shard = moe_experts.LAYERS[-1]
    with InsteadOfCuda("meta"), buffers_at_most(1):
        moe_experts._case(shard, 4).calls()[0]()
    assert (shard.num_local, seen["num_experts"]) == (32, 256)
    assert seen["residual"].shape == (4, shard.hidden)
