"""Causal attention of whole prompts, beside torch's fused attention on the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels import use_backend
from headrace_kernels.backend import Backend
from headrace_kernels.causal_attention import causal_attention
from headrace_kernels.gpu.causal_attention import config_key
from headrace_kernels.gpu.configs import Config
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

# Query heads, key heads, key width, value width.
HEADS = {"V3": (128, 128, 192, 128), "V2-Lite": (16, 16, 192, 128), "Mixtral": (32, 8, 128, 128)}
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# The best of vLLM's and TensorRT-LLM's attention kernels on an H200 in the tables of NVIDIA's aiconfigurator.
PUBLISHED_US = {"V3": (136.0, 380.0, 1249.0, 4290.0, 15500.0), "V2-Lite": (34.0, 81.0, 206.0, 632.0, 1940.0)}
_SOURCE = "aiconfigurator 095f58a51, context_mla_perf"


def cases() -> list[BenchCase]:
    """One sequence of each length, for each model's heads."""
    return [_case(model, length) for model in HEADS for length in LENGTHS]


def tuning() -> list[TuningCase]:
    """Tiles, at 8,192 tokens."""
    found: list[TuningCase] = []
    for model in ("V3", "Mixtral"):
        heads, _, key_dim, value_dim = HEADS[model]
        query = torch.empty(1, heads, key_dim, dtype=torch.bfloat16, device="meta")
        changes = _changes(key_dim, value_dim)
        found.append(("causal_attention", config_key(query, value_dim), changes, _case(model, 8192)))
    return found


def _changes(key_dim: int, value_dim: int) -> list[Config]:
    """Queries stay in shared memory beside the stages; scores and the result's sums are registers."""
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}
        for m, num_warps in ((64, 4), (128, 4), (128, 8))
        for n in (32, 64, 128)
        for num_stages in (1, 2, 3, 4)
        if fits(
            num_warps,
            shared_bytes=2 * (m * key_dim + num_stages * n * (key_dim + value_dim)),
            values=m * (n + value_dim),
        )
    ]


def attention_flops(num_heads: int, widths: int, queries: int, keys: int) -> float:
    """Return the FLOPs of `queries` new tokens at the end of `keys`, each seeing itself and what is before it."""
    pairs = queries * (keys - queries) + queries * (queries + 1) / 2
    return 2.0 * num_heads * widths * pairs


def _case(model: str, length: int) -> BenchCase:
    heads, groups, key_dim, value_dim = HEADS[model]
    published = PUBLISHED_US.get(model)
    return BenchCase(
        family="causal_attention",
        shape=f"{model} S={length} H={heads} G={groups} {key_dim}/{value_dim}",
        calls=_calls(model, length, "triton"),
        bytes_moved=2.0 * length * (heads + groups) * (key_dim + value_dim),
        flops=attention_flops(heads, key_dim + value_dim, length, length),
        peers={"torch": _calls(model, length, "reference")},
        published_us=published[LENGTHS.index(length)] if published else None,
        published_source=_SOURCE if published else "",
    )


def _calls(model: str, length: int, name: Backend) -> Calls:
    heads, groups, key_dim, value_dim = HEADS[model]

    def run(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        with use_backend(name):
            return causal_attention(query, key, value, starts, starts, scale=key_dim**-0.5)

    def make() -> list[Callable[[], object]]:
        starts = torch.tensor([0, length], dtype=torch.int32)
        shapes = ((length, heads, key_dim), (length, groups, key_dim), (length, groups, value_dim))
        return [
            partial(run, *(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes), starts)
            for _ in range(num_buffers(2.0 * length * heads * (key_dim + value_dim)))
        ]

    return make
