"""Whatever a kernel reads shows in what it gives: a NaN or an infinity never comes out as an ordinary number.

This is what every test with NaN around its tensors rests on, and why damaged weights or an overflow end in an error and
not in fluent text. Each case is a call and, by input, one place that the last row of the result reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.act_quant import act_quant, dequantise
from headrace_kernels.backend import what_is_missing
from headrace_kernels.causal_attention import causal_attention
from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.fp8_groups import FP8
from headrace_kernels.gpu.configs import use_config
from headrace_kernels.gqa_decode import gqa_decode
from headrace_kernels.gqa_prefill import gqa_prefill
from headrace_kernels.grouped_gemm import combine_assignments, experts_down, experts_gate_up
from headrace_kernels.latent_fp8 import pack_latents, unpack_latents
from headrace_kernels.latent_load import latent_load
from headrace_kernels.latent_store import latent_norm_rope_store, latent_store
from headrace_kernels.mla_decode import mla_decode, mla_decode_values
from headrace_kernels.mla_prefill import mla_prefill
from headrace_kernels.mla_prologue import mla_prologue
from headrace_kernels.moe_experts import moe_experts
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.moe_routing import moe_routing
from headrace_kernels.page_copy import gather_pages
from headrace_kernels.rms_norm import add_rms_norm, rms_norm
from headrace_kernels.rope import rope
from headrace_kernels.routing_rule import Router, RoutingRule
from torch import Tensor

from tests.parity.kernels.attention_cases import SMALL_TILES, starts
from tests.parity.kernels.moe_cases import blocks_of, gate_up_weight, weight

NAN, INF = float("nan"), float("inf")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`run` gives rows for `shapes`; of `only_nan` an infinity may be right to vanish, as where a score is -inf."""

    run: Callable[[Inputs], Tensor]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    only_nan: tuple[str, ...] = ()


def cosines(count, half):
    turn = torch.arange(1.0, count * half + 1).view(count, half)
    return turn.cos(), turn.sin()


def causal(t):
    one = starts([len(t["query"])]), starts([len(t["key"])])
    return causal_attention(t["query"], t["key"], t["value"], *one, scale=0.3)


def expanded(t):
    one = starts([len(t["query"])]), starts([len(t["rows"])])
    return mla_prefill(t["query"], t["rows"], t["w_uk"], t["w_uv"], *one, scale=0.3)


def grouped(t):
    slots = torch.arange(5, device=t["cache"].device)
    return gqa_prefill(t["query"], t["cache"], slots, starts([3]), starts([5]), scale=0.3)


def rows_of_pages(device, length=20):
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    return table, torch.tensor([length], dtype=torch.int32, device=device)


def absorbed(t):
    return mla_decode(t["query"], t["cache"], *rows_of_pages(t["query"].device), kv_lora_rank=8, scale=0.3)


def absorbed_fp8(t):
    cache = pack_latents(t["cache"], 128, 4)
    return mla_decode(t["query"], cache, *rows_of_pages(t["query"].device), kv_lora_rank=128, scale=0.01)


def absorbed_values(t):
    return mla_decode_values(t["query"], t["cache"], *rows_of_pages(t["query"].device), t["w_uv"], scale=0.3)


def grouped_decode(t):
    return gqa_decode(t["query"], t["cache"], *rows_of_pages(t["query"].device), scale=0.3)


def stored(t):
    cache = torch.zeros(4, t["latents"].shape[1], dtype=t["latents"].dtype, device=t["latents"].device)
    latent_store(t["latents"], cache, torch.tensor([2, 3], device=cache.device))
    assert cache[2].isfinite().all()
    return cache


def new_row(t, cache):
    angles = [each.to(cache.device) for each in cosines(2, 2)]
    return t["c_kv"], t["k_pe"], t["norm_weight"], *angles, cache, torch.tensor([2, 3], device=cache.device)


def rotated(t):
    return rope(t["x"], *(each.to(t["x"].device) for each in cosines(2, 2)), is_interleaved=True)


def stored_new(t):
    cache = torch.zeros(4, 12, dtype=t["c_kv"].dtype, device=t["c_kv"].device)
    latent_norm_rope_store(*new_row(t, cache), eps=1e-6, is_interleaved=True)
    return cache


def stored_new_fp8(t):
    widths = t["c_kv"].shape[1], 4
    packed = pack_latents(torch.zeros(4, sum(widths), device=t["c_kv"].device), *widths)
    latent_norm_rope_store(*new_row(t, packed), eps=1e-6, is_interleaved=True)
    return unpack_latents(packed, *widths)


def loaded_fp8(t):
    cache, slots = pack_latents(t["rows"], 64, 4), torch.tensor([0, 2], device=t["rows"].device)
    return latent_load(cache, slots, kv_lora_rank=64, rope_dim=4, dtype=torch.bfloat16)


def prologue(t):
    cache = torch.zeros(4, 12, dtype=t["c_kv"].dtype, device=t["c_kv"].device)
    query = mla_prologue(t["query"], t["w_uk"], *new_row(t, cache), eps=1e-6, is_interleaved=True)
    return torch.cat((query.flatten(1), cache[2:]), dim=1)


SIGMOID = RoutingRule(2, "sigmoid", 2, 1, True, True, 2.5)
SOFTMAX = RoutingRule(2, "softmax")


def routed(rule):
    return lambda t: moe_routing(t["logits"], t.get("bias"), rule, 1)[1][:, :2]


def routed_from_tokens(t):
    router = Router(t["router"], t["bias"], SIGMOID)
    return route_and_sort(t["x"], t["norm_weight"], 1e-6, router, 16).weights


def all_experts(count, device):
    """Every token passes all of `count` experts."""
    return torch.arange(count, device=device).expand(2, -1).contiguous()


def layer(t):
    experts = all_experts(3, t["x"].device).repeat(len(t["x"]) // 2, 1)
    return moe_experts(t["x"], experts, t["weights"], t["gate_up"], t["down"], residual=t["residual"])


def layer_by_blocks(t):
    experts = all_experts(3, t["x"].device)
    rows = experts_gate_up(t["x"], t["gate_up"], blocks_of(experts, 3))
    rows = experts_down(rows, t["down"], blocks_of(experts, 3))
    return combine_assignments(rows, experts, t["weights"], range(3), t["residual"])


def layer_fp8(t):
    """Weights are fp8 throughout; what is poisoned is their scales, the tokens and the routing."""
    torch.manual_seed(1)
    device = t["x"].device
    gate_up, gate_up_scale = gate_up_weight(3, 16, 32, FP8, device)
    down, down_scale = weight((3, 32, 16), FP8, device)
    scales = gate_up_scale * t["gate_up_scale"], down_scale * t["down_scale"]
    experts = all_experts(3, device)
    return moe_experts(t["x"], experts, t["weights"], gate_up, down, blocks=blocks_of(experts, 3), scales=scales)


def quantised(t):
    return dequantise(*act_quant(t["x"]))


EXPERTS = {"weights": (2, 3), "gate_up": (3, 2 * 8, 16), "down": (3, 16, 8), "x": (2, 16), "residual": (2, 16)}
NEW_ROW = {"c_kv": (2, 8), "k_pe": (2, 4), "norm_weight": (8,)}
FULL_NEW_ROW = {"c_kv": (2, 128), "k_pe": (2, 4), "norm_weight": (128,)}
# The last row of decode attention reads page 1, then the first tokens of page 0.
CASES = {
    "causal_attention, one key": Case(
        causal, {"query": (1, 2, 8), "key": (1, 1, 8), "value": (1, 1, 4)}, only_nan=("key",)
    ),
    "causal_attention": Case(causal, {"query": (5, 2, 8), "key": (5, 1, 8), "value": (5, 1, 8)}, only_nan=("key",)),
    "causal_attention, cached": Case(
        causal, {"query": (3, 2, 8), "key": (20, 1, 8), "value": (20, 1, 8)}, only_nan=("key",)
    ),
    "mla_prefill": Case(
        expanded,
        {"query": (3, 2, 12), "rows": (5, 12), "w_uk": (2, 8, 8), "w_uv": (2, 4, 8)},
        {"rows": (4, 3)},
        only_nan=("w_uk",),
    ),
    "gqa_prefill, key": Case(
        grouped, {"query": (3, 2, 8), "cache": (2, 2, 4, 1, 8)}, {"cache": (0, 0, 1, 0, 3)}, only_nan=("cache",)
    ),
    "gqa_prefill, value": Case(grouped, {"query": (3, 2, 8), "cache": (2, 2, 4, 1, 8)}, {"cache": (0, 1, 1, 0, 3)}),
    "mla_decode": Case(absorbed, {"query": (1, 2, 12), "cache": (2, 16, 12)}, {"cache": (0, 3, 5)}),
    "mla_decode, rope": Case(
        absorbed, {"query": (1, 2, 12), "cache": (2, 16, 12)}, {"cache": (1, 3, 11)}, only_nan=("cache",)
    ),
    "mla_decode, fp8": Case(absorbed_fp8, {"query": (1, 2, 132), "cache": (2, 16, 132)}, {"cache": (0, 3, 5)}),
    "mla_decode_values": Case(
        absorbed_values, {"query": (1, 2, 12), "cache": (2, 16, 12), "w_uv": (2, 4, 8)}, {"cache": (1, 3, 5)}
    ),
    "gqa_decode, key": Case(
        grouped_decode, {"query": (1, 2, 8), "cache": (2, 2, 16, 1, 8)}, {"cache": (0, 0, 1, 0, 3)}, only_nan=("cache",)
    ),
    "gqa_decode, value": Case(
        grouped_decode, {"query": (1, 2, 8), "cache": (2, 2, 16, 1, 8)}, {"cache": (0, 1, 1, 0, 3)}
    ),
    "latent_store": Case(stored, {"latents": (2, 9)}),
    "latent_norm_rope_store": Case(stored_new, NEW_ROW),
    "latent_norm_rope_store, fp8": Case(stored_new_fp8, FULL_NEW_ROW),
    "latent_norm_rope_store, fp8, half a group": Case(
        stored_new_fp8, {**FULL_NEW_ROW, "c_kv": (2, 64), "norm_weight": (64,)}
    ),
    "latent_load, fp8, latent": Case(loaded_fp8, {"rows": (3, 68)}, {"rows": (2, 63)}),
    "latent_load, fp8, rope": Case(loaded_fp8, {"rows": (3, 68)}, {"rows": (2, 65)}),
    "mla_prologue": Case(prologue, {"query": (2, 2, 12), "w_uk": (2, 8, 8), **NEW_ROW}),
    "rms_norm": Case(lambda t: rms_norm(t["x"], t["w"], 1e-6), {"x": (2, 9), "w": (9,)}),
    "add_rms_norm": Case(
        lambda t: add_rms_norm(t["x"], t["y"], t["w"], 1e-6)[0], {"x": (2, 9), "y": (2, 9), "w": (9,)}
    ),
    "rope": Case(rotated, {"x": (2, 1, 4)}),
    "norm_linear": Case(
        lambda t: norm_linear(t["x"], t["n"], t["w"], 1e-6, t["b"]), {"x": (2, 9), "n": (9,), "w": (5, 9), "b": (5,)}
    ),
    "linear_add": Case(lambda t: linear_add(t["x"], t["w"], t["r"]), {"x": (2, 9), "w": (5, 9), "r": (2, 5)}),
    "act_quant": Case(quantised, {"x": (2, 130)}),
    "moe_routing, sigmoid": Case(routed(SIGMOID), {"logits": (2, 6), "bias": (6,)}),
    "moe_routing, softmax": Case(routed(SOFTMAX), {"logits": (2, 6)}),
    "moe_router": Case(routed_from_tokens, {"x": (2, 16), "norm_weight": (16,), "router": (6, 16), "bias": (6,)}),
    "moe_experts, few": Case(layer, EXPERTS),
    "moe_experts, many": Case(layer, {**EXPERTS, "x": (6, 16), "weights": (6, 3), "residual": (6, 16)}),
    "moe_experts, by blocks": Case(layer_by_blocks, EXPERTS),
    "moe_experts, fp8": Case(
        layer_fp8, {"x": (2, 32), "weights": (2, 3), "gate_up_scale": (3, 2, 1), "down_scale": (3, 1, 1)}
    ),
    "page_copy": Case(
        lambda t: gather_pages(t["cache"], torch.tensor([2, 1], device=t["cache"].device)),
        {"cache": (3, 4, 5)},
        {"cache": (1, 2, 3)},
    ),
}
FP8_TAKES_BFLOAT16 = ("moe_experts, fp8",)


@pytest.fixture(autouse=True)
def small_tiles():
    with use_config("causal_attention", SMALL_TILES):
        yield


def inputs(case, name, device):
    tensors = {key: (torch.rand(shape) + 0.5).to(device) for key, shape in case.shapes.items()}
    return {k: v.bfloat16() if name in FP8_TAKES_BFLOAT16 and k == "x" else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("backend", "is_on_cpu"), [("triton", False), ("reference", False), ("reference", True), ("cpu", True)]
)
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_and_not_finite_comes_out(name, backend, is_on_cpu, device):
    problem = what_is_missing("cpu") if backend == "cpu" else None
    if problem:
        pytest.skip(problem)
    case = CASES[name]
    device = "cpu" if is_on_cpu else device
    # The interpreter is slow, and to it one sign is as good as the other. On a GPU torch's own attention, with which a
    # worker compares the kernels before it serves, takes a row whose scores are all -inf for one that sees nothing.
    infinities = (INF, -INF) if is_on_cpu else (INF,)
    with use_backend(backend):
        assert case.run(inputs(case, name, device))[-1].isfinite().all(), "finite inputs give finite rows"
        for spoilt, shape in case.shapes.items():
            place = case.places.get(spoilt, tuple(length - 1 for length in shape))
            for value in (NAN,) if spoilt in case.only_nan else (NAN, *infinities):
                tensors = inputs(case, name, device)
                tensors[spoilt][place] = value
                assert not case.run(tensors)[-1].isfinite().all(), f"{value} in {spoilt} vanished"
