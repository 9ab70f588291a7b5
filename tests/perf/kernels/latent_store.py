"""Storing new latents, normalised and rotated on the way, beside the same in torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from headrace_kernels.latent_fp8 import pack_latents, row_bytes
from headrace_kernels.latent_store import latent_norm_rope_store
from headrace_kernels.rope import rope_ref
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers

LATENT_DIM, ROPE_DIM = 512, 64
_SLOTS = 64 * 4096
_EPS = 1e-6


def cases() -> list[BenchCase]:
    """A decode batch and a prompt, for a cache in bfloat16 and in fp8."""
    return [_case(tokens, is_fp8) for is_fp8 in (False, True) for tokens in (1, 128, 4096)]


def _case(tokens: int, is_fp8: bool) -> BenchCase:
    row = row_bytes(LATENT_DIM, ROPE_DIM) if is_fp8 else 2 * (LATENT_DIM + ROPE_DIM)
    return BenchCase(
        family="latent_store",
        shape=f"norm, rope, store T={tokens} {'fp8' if is_fp8 else 'bf16'} cache",
        calls=_calls(_ours, tokens, is_fp8),
        bytes_moved=tokens * (2.0 * (LATENT_DIM + ROPE_DIM) + row + 4.0 * ROPE_DIM),
        peers={"torch": _calls(_torch, tokens, is_fp8)},
    )


def _calls(function: Callable[..., object], tokens: int, is_fp8: bool) -> Calls:
    width, dtype = (row_bytes(LATENT_DIM, ROPE_DIM), torch.uint8) if is_fp8 else (LATENT_DIM + ROPE_DIM, torch.bfloat16)

    def make() -> list[Callable[[], object]]:
        cache = torch.zeros(_SLOTS, width, dtype=dtype, device="cuda")
        weight = torch.rand(LATENT_DIM, device="cuda").bfloat16()
        turn = torch.rand(tokens, ROPE_DIM // 2, device="cuda") * 1000
        tables = (weight, turn.cos(), turn.sin(), cache)

        def call() -> Callable[[], object]:
            projected = torch.randn(tokens, LATENT_DIM + ROPE_DIM, dtype=torch.bfloat16, device="cuda")
            new: tuple[Tensor, ...] = projected.split([LATENT_DIM, ROPE_DIM], dim=1)
            slots = torch.randperm(_SLOTS, device="cuda")[:tokens]
            return partial(function, *new, *tables, slots)

        return [call() for _ in range(num_buffers(2.0 * tokens * width))]

    return make


def _ours(*arguments: Tensor) -> None:
    latent_norm_rope_store(*arguments, eps=_EPS, is_interleaved=True)


def _torch(
    c_kv: Tensor, k_pe: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
) -> Tensor:
    key = rope_ref(k_pe[:, None], cos, sin, is_interleaved=True)[:, 0]
    rows = torch.cat((F.rms_norm(c_kv, weight.shape, weight, _EPS), key), dim=1)
    return cache.index_copy_(0, slots, pack_latents(rows, LATENT_DIM, ROPE_DIM) if cache.dtype == torch.uint8 else rows)
