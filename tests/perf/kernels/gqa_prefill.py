"""Mixtral's attention of a prompt chunk over pages, beside gathering them for torch's fused attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels import use_backend
from headrace_kernels.backend import Backend
from headrace_kernels.gqa_prefill import gqa_prefill
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers
from tests.perf.kernels.causal_attention import attention_flops

# New tokens and all tokens.
CHUNKS = ((1024, 1024), (4096, 4096), (2048, 16384))
_HEADS, _GROUPS, _DIM, _PAGE = 32, 8, 128, 64


def cases() -> list[BenchCase]:
    """Each chunk, on pages in random order."""
    return [
        BenchCase(
            family="gqa_prefill",
            shape=f"Mixtral H={_HEADS} G={_GROUPS} D={_DIM} new={queries} of {keys}",
            calls=_calls(queries, keys, "triton"),
            bytes_moved=4.0 * _DIM * (queries * _HEADS + keys * _GROUPS),
            flops=attention_flops(_HEADS, 2 * _DIM, queries, keys),
            peers={"torch": _calls(queries, keys, "reference")},
        )
        for queries, keys in CHUNKS
    ]


def _calls(queries: int, keys: int, name: Backend) -> Calls:
    def run(query: Tensor, cache: Tensor, slots: Tensor, starts: tuple[Tensor, Tensor]) -> Tensor:
        with use_backend(name):
            return gqa_prefill(query, cache, slots, *starts, scale=_DIM**-0.5)

    def make() -> list[Callable[[], object]]:
        starts = (torch.tensor([0, queries], dtype=torch.int32), torch.tensor([0, keys], dtype=torch.int32))
        pages = torch.randperm(keys // _PAGE, device="cuda")
        slots = (pages[:, None] * _PAGE + torch.arange(_PAGE, device="cuda")).view(-1)
        shapes = ((queries, _HEADS, _DIM), (keys // _PAGE, 2, _PAGE, _GROUPS, _DIM))
        return [
            partial(run, *(torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in shapes), slots, starts)
            for _ in range(num_buffers(4.0 * keys * _GROUPS * _DIM))
        ]

    return make
