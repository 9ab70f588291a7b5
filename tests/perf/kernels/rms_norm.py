"""RMS norm of hidden states with their residual, and of latents, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from headrace_kernels.rms_norm import add_rms_norm, rms_norm
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers

WIDTHS = {"V2-Lite": 2048, "Mixtral": 4096, "V3": 7168}
_EPS = 1e-6

Norm = Callable[[Tensor, Tensor, Tensor], object]


def cases() -> list[BenchCase]:
    """With a residual for each hidden width; alone for the query's latent of DeepSeek-V3."""
    added = [_case(name, tokens, width, 4, _add) for name, width in WIDTHS.items() for tokens in (1, 128, 4096)]
    return added + [_case("V3 query latent", tokens, 1536, 2, _alone) for tokens in (1, 128, 4096)]


def _case(name: str, tokens: int, width: int, passes: int, ours: Norm) -> BenchCase:
    peer = _torch_add if ours is _add else _torch_alone
    return BenchCase(
        family="rms_norm",
        shape=f"{ours.__name__.removeprefix('_')} {name} T={tokens} N={width}",
        calls=_calls(ours, tokens, width),
        bytes_moved=2.0 * passes * tokens * width,
        peers={"torch": _calls(peer, tokens, width)},
    )


def _calls(norm: Norm, tokens: int, width: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        count = num_buffers(4.0 * tokens * width)
        return [partial(norm, random(tokens, width), random(tokens, width), random(width)) for _ in range(count)]

    return make


def _add(x: Tensor, residual: Tensor, weight: Tensor) -> object:
    return add_rms_norm(x, residual, weight, _EPS)


def _torch_add(x: Tensor, residual: Tensor, weight: Tensor) -> object:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, _EPS), total


def _alone(x: Tensor, _: Tensor, weight: Tensor) -> object:
    return rms_norm(x, weight, _EPS)


def _torch_alone(x: Tensor, _: Tensor, weight: Tensor) -> object:
    return F.rms_norm(x, weight.shape, weight, _EPS)
