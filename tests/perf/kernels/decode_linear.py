"""Projections of a decode step, with their norm or their residual, beside torch's own layer and the norm or sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from headrace_kernels.decode_linear import linear_add, norm_linear
from headrace_kernels.gpu.configs import Config
from headrace_kernels.gpu.decode_linear import key
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

# Inputs and outputs: query and latent projections, which follow a norm, and output projections, which a residual joins.
NORM_SHAPES = {"V2-Lite": (2048, 3648), "V3": (7168, 2112), "Mixtral": (4096, 6144)}
ADD_SHAPES = {"V2-Lite": (2048, 2048), "V3": (16384, 7168), "Mixtral": (4096, 4096)}
TOKENS = (1, 16, 32, 64, 128, 256)
_EPS = 1e-6

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], object]


def cases() -> list[BenchCase]:
    """One case for each projection and number of tokens."""
    norms = [_case("norm_linear", name, tokens) for name in NORM_SHAPES for tokens in TOKENS]
    return norms + [_case("linear_add", name, tokens) for name in ADD_SHAPES for tokens in TOKENS]


def tuning() -> list[TuningCase]:
    """Tiles for every shape of `cases`."""
    found: list[TuningCase] = []
    for kind, shapes in (("norm_linear", NORM_SHAPES), ("linear_add", ADD_SHAPES)):
        for name, (inputs, outputs) in shapes.items():
            weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device="meta")
            for tokens in (16, 32, 64, 128, 256):
                found.append(("decode_linear", key(tokens, weight), _changes(tokens), _case(kind, name, tokens)))
    return found


def _changes(tokens: int) -> list[Config]:
    return [
        {"BLOCK_O": outputs, "BLOCK_T": tile, "BLOCK_I": inputs, "num_warps": num_warps, "num_stages": num_stages}
        for outputs in (16, 32, 64, 128)
        for tile in (16, 32, 64)
        for inputs, num_stages in ((128, 4), (128, 6), (256, 3))
        for num_warps in (4, 8)
        if tile <= tokens
        and fits(num_warps, shared_bytes=2 * inputs * num_stages * (outputs + tile), values=outputs * tile)
    ]


def _case(kind: str, name: str, tokens: int) -> BenchCase:
    inputs, outputs = (NORM_SHAPES if kind == "norm_linear" else ADD_SHAPES)[name]
    rows = 1 if kind == "norm_linear" else 2
    return BenchCase(
        family="decode_linear",
        shape=f"{kind} {name} T={tokens} {inputs} to {outputs}",
        calls=_calls(_ours_norm if kind == "norm_linear" else _ours_add, tokens, inputs, outputs),
        bytes_moved=2.0 * (inputs * outputs + tokens * (inputs + rows * outputs)),
        flops=2.0 * tokens * inputs * outputs,
        peers={"torch": _calls(_torch_norm if kind == "norm_linear" else _torch_add, tokens, inputs, outputs)},
    )


def _calls(layer: Layer, tokens: int, inputs: int, outputs: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        return [
            partial(layer, random(tokens, inputs), random(inputs), random(outputs, inputs), random(tokens, outputs))
            for _ in range(num_buffers(2.0 * inputs * outputs))
        ]

    return make


def _ours_norm(x: Tensor, norm_weight: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return norm_linear(x, norm_weight, weight, _EPS)


def _torch_norm(x: Tensor, norm_weight: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, norm_weight.shape, norm_weight, _EPS), weight)


def _ours_add(x: Tensor, _: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return linear_add(x, weight, residual)


def _torch_add(x: Tensor, _: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.addmm(residual, x, weight.T)
