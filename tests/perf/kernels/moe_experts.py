"""A layer's experts with its residual, all launches together; experts hit are counted, not assumed.

The peer is torch's grouped product with what it needs around it: index kernels that sort rows by expert and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from headrace_kernels.fp8_groups import FP8, num_groups
from headrace_kernels.gpu.configs import Config
from headrace_kernels.moe_experts import FEW_TOKENS, moe_experts
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

_SOURCE = "ai-dynamo/aiconfigurator 095f58a51, h200_sxm moe_perf, best of its kernels"


@dataclass(frozen=True)
class Layer:
    """A model's experts; `published` gives an H200's µs by the number of tokens."""

    name: str
    hidden: int
    width: int
    num_experts: int
    top_k: int
    num_local: int
    dtype: torch.dtype
    published: dict[int, float]

    @property
    def expert_bytes(self) -> float:
        values = 3.0 * self.hidden * self.width * self.dtype.itemsize
        scales = 3 * num_groups(self.hidden) * num_groups(self.width) if self.dtype == FP8 else 0
        return values + 4.0 * scales

    def step_bytes(self, tokens: int) -> float:
        """Return what tokens and their routing take: tokens, residuals and results; ids of 8 bytes, weights of 4."""
        return tokens * (6.0 * self.hidden + 12.0 * self.top_k)


LAYERS = (
    Layer("V2-Lite", 2048, 1408, 64, 6, 64, torch.bfloat16, {}),
    Layer(
        *("Qwen3-30B", 2048, 768, 128, 8, 128, torch.bfloat16),
        {1: 37, 4: 87, 8: 164, 16: 292, 32: 301, 128: 304, 256: 323, 1024: 389, 4096: 660},
    ),
    Layer(
        *("Mixtral", 4096, 14336, 8, 2, 8, torch.bfloat16),
        {1: 189, 4: 661, 16: 660, 32: 666, 128: 687, 256: 751, 1024: 1001, 4096: 3595},
    ),
    Layer(
        *("V3 at EP8", 7168, 2048, 256, 8, 32, FP8),
        {1: 40, 4: 71, 8: 114, 16: 195, 32: 358, 128: 365, 256: 376, 1024: 445, 4096: 726},
    ),
)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


def cases() -> list[BenchCase]:
    """Decode steps and prefills of every layer."""
    return [_case(layer, tokens) for layer in LAYERS for tokens in TOKENS]


def tuning() -> list[TuningCase]:
    """Tiles of each of the two launches for few tokens, by layer, at the fewest that hit an expert held here."""
    changes: list[Config] = [
        {"BLOCK_O": outputs, "BLOCK_K": inputs, "num_warps": num_warps}
        for outputs in (2, 4, 8, 16)
        for inputs in (256, 512, 1024, 2048)
        for num_warps in (2, 4, 8)
        # Sums of gate and up, and as many weights that are waited for.
        if fits(num_warps, values=4 * outputs * inputs)
    ]
    found: list[TuningCase] = []
    for layer in LAYERS:
        tokens = 1 if layer.num_local == layer.num_experts else FEW_TOKENS
        for launch, outputs, inputs in (
            ("gate_up", layer.width, layer.hidden),
            ("down", layer.hidden, layer.width),
        ):
            key = f"{launch} {layer.dtype} {outputs}x{inputs}"
            found.append(("moe_experts", key, changes, _case(layer, tokens)))
    return found


def _case(layer: Layer, tokens: int) -> BenchCase:
    experts = _routing(layer, tokens)
    is_local = experts < layer.num_local
    num_hit = len(experts[is_local].unique())
    rows = int(is_local.sum())
    peers = (
        {"torch._grouped_mm and index kernels": _calls(_torch, layer, tokens)} if layer.dtype == torch.bfloat16 else {}
    )
    return BenchCase(
        family="moe_experts",
        shape=f"{layer.name} {layer.dtype.itemsize * 8} bit T={tokens}, {num_hit} of {layer.num_local} experts hit",
        calls=_calls(_ours, layer, tokens),
        bytes_moved=num_hit * layer.expert_bytes + layer.step_bytes(tokens),
        flops=6.0 * rows * layer.hidden * layer.width,
        ceiling="fp8" if layer.dtype == FP8 else "bf16",
        peers=peers,
        published_us=layer.published.get(tokens),
        published_source=_SOURCE if tokens in layer.published else "",
    )


def _routing(layer: Layer, tokens: int) -> Tensor:
    """Return experts [T, K], the same at every call: what they hit is part of the floor."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, layer.num_experts, generator=generator).topk(layer.top_k, dim=1).indices


def _calls(run: Callable[[Inputs], object], layer: Layer, tokens: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        return [partial(run, _inputs(layer, tokens)) for _ in range(num_buffers(layer.num_local * layer.expert_bytes))]

    return make


@dataclass(frozen=True)
class Inputs:
    """What a layer computes from; `num_experts` are those that tokens chose from, local or not."""

    x: Tensor
    residual: Tensor
    experts: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    scales: tuple[Tensor, Tensor] | None
    num_experts: int


def _inputs(layer: Layer, tokens: int) -> Inputs:
    def weight(*shape: int) -> Tensor:
        return torch.stack([(torch.randn(shape[1:], device="cuda") / 32).to(layer.dtype) for _ in range(shape[0])])

    x, residual = (torch.randn(tokens, layer.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    experts = _routing(layer, tokens).cuda()
    weights = torch.rand(experts.shape, device="cuda")
    gate_up = weight(layer.num_local, 2 * layer.width, layer.hidden)
    down = weight(layer.num_local, layer.hidden, layer.width)
    return Inputs(x, residual, experts, weights, gate_up, down, _scales(layer), layer.num_experts)


def _scales(layer: Layer) -> tuple[Tensor, Tensor] | None:
    if layer.dtype != FP8:
        return None
    groups = num_groups(layer.hidden), num_groups(layer.width)
    gate_up = torch.ones(layer.num_local, 2 * groups[1], groups[0], device="cuda")
    return gate_up, torch.ones(layer.num_local, *groups, device="cuda")


def _ours(inputs: Inputs) -> Tensor:
    routing, stacks = (inputs.experts, inputs.weights), (inputs.gate_up, inputs.down)
    options = {"residual": inputs.residual, "num_experts": inputs.num_experts, "scales": inputs.scales}
    return moe_experts(inputs.x, *routing, *stacks, **options)  # type: ignore[arg-type]


def _torch(inputs: Inputs) -> Tensor:
    x, experts = inputs.x, inputs.experts
    order = experts.view(-1).argsort(stable=True)
    counts = (experts.view(-1, 1) == torch.arange(len(inputs.gate_up), device=x.device)).sum(dim=0)
    ends = counts.cumsum(0).int()
    gate, up = torch._grouped_mm(x[order // experts.shape[1]], inputs.gate_up.transpose(1, 2), ends).chunk(2, dim=1)
    rows = torch._grouped_mm(F.silu(gate) * up, inputs.down.transpose(1, 2), ends)
    per_token = torch.empty_like(rows).index_copy_(0, order, rows).view(*experts.shape, -1)
    return inputs.residual + (per_token * inputs.weights[:, :, None]).sum(dim=1).to(x.dtype)
