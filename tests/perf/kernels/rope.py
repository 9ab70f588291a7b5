"""Rotary embedding of the queries' last columns, beside its specification in torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels.rope import rope, rope_ref
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers

# Heads, columns of a head, rotated columns at its end.
SHAPES = {"V2-Lite": (16, 192, 64), "V3": (128, 192, 64), "Mixtral": (40, 128, 128)}


def cases() -> list[BenchCase]:
    """The queries of one model each, for a decode batch and a prompt."""
    return [_case(name, tokens) for name in SHAPES for tokens in (128, 4096)]


def _case(name: str, tokens: int) -> BenchCase:
    heads, _, width = SHAPES[name]
    return BenchCase(
        family="rope",
        shape=f"{name} T={tokens} H={heads} R={width}",
        calls=_calls(rope, name, tokens),
        bytes_moved=4.0 * tokens * heads * width + 4.0 * tokens * width,
        peers={"torch": _calls(rope_ref, name, tokens)},
    )


def _calls(function: Callable[..., Tensor], name: str, tokens: int) -> Calls:
    heads, head_dim, width = SHAPES[name]

    def make() -> list[Callable[[], object]]:
        turn = torch.rand(tokens, width // 2, device="cuda") * 1000
        angles = (turn.cos(), turn.sin())
        calls: list[Callable[[], object]] = []
        for _ in range(num_buffers(2.0 * tokens * heads * head_dim)):
            query = torch.randn(tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
            x = query[..., head_dim - width :]
            calls.append(partial(function, x, *angles, is_interleaved=name != "Mixtral"))
        return calls

    return make
