"""Expanded latent attention of a prompt chunk, whole and behind a cached prefix, beside its torch formulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels import use_backend
from headrace_kernels.backend import Backend
from headrace_kernels.mla_prefill import mla_prefill
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers
from tests.perf.kernels.causal_attention import attention_flops

HEADS = {"V2-Lite": 16, "K2": 64, "V3": 128}
# New tokens and all tokens.
CHUNKS = ((1024, 1024), (4096, 4096), (2048, 16384))
_LATENT, _NOPE, _ROPE, _VALUE = 512, 128, 64, 128


def cases() -> list[BenchCase]:
    """Each model's heads at each chunk."""
    return [_case(model, *chunk) for model in HEADS for chunk in CHUNKS]


def _case(model: str, queries: int, keys: int) -> BenchCase:
    heads = HEADS[model]
    expanding = 2.0 * keys * _LATENT * heads * (_NOPE + _VALUE)
    weights = heads * (_NOPE + _VALUE) * _LATENT
    return BenchCase(
        family="mla_prefill",
        shape=f"{model} H={heads} new={queries} of {keys}",
        calls=_calls(heads, queries, keys, "triton"),
        bytes_moved=2.0 * (queries * heads * (_NOPE + _ROPE + _VALUE) + keys * (_LATENT + _ROPE) + weights),
        flops=expanding + attention_flops(heads, _NOPE + _ROPE + _VALUE, queries, keys),
        peers={"torch": _calls(heads, queries, keys, "reference")},
    )


def _calls(heads: int, queries: int, keys: int, name: Backend) -> Calls:
    def run(query: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, starts: tuple[Tensor, Tensor]) -> Tensor:
        with use_backend(name):
            return mla_prefill(query, rows, w_uk, w_uv, *starts, scale=(_NOPE + _ROPE) ** -0.5)

    def make() -> list[Callable[[], object]]:
        starts = (torch.tensor([0, queries], dtype=torch.int32), torch.tensor([0, keys], dtype=torch.int32))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * shape[-1] ** -0.5

        return [
            partial(
                run,
                random(queries, heads, _NOPE + _ROPE),
                random(keys, _LATENT + _ROPE),
                random(heads, _NOPE, _LATENT),
                random(heads, _VALUE, _LATENT),
                starts,
            )
            for _ in range(num_buffers(2.0 * queries * heads * (_NOPE + _ROPE)))
        ]

    return make
