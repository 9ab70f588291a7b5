"""Reading fp8 rows of a latent cache for a prompt's attention, beside the same in torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels.latent_fp8 import row_bytes
from headrace_kernels.latent_load import latent_load, latent_load_ref
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, num_buffers

LATENT_DIM, ROPE_DIM = 512, 64
_SLOTS = 64 * 4096


def cases() -> list[BenchCase]:
    """A prompt, and the prefix of a long conversation."""
    return [_case(4096), _case(32_768)]


def _case(tokens: int) -> BenchCase:
    return BenchCase(
        family="latent_load",
        shape=f"S={tokens} fp8 to bf16",
        calls=_calls(latent_load, tokens),
        bytes_moved=_bytes(tokens),
        peers={"torch": _calls(latent_load_ref, tokens)},
    )


def _bytes(tokens: int) -> float:
    return tokens * (row_bytes(LATENT_DIM, ROPE_DIM) + 2.0 * (LATENT_DIM + ROPE_DIM))


def _calls(function: Callable[..., Tensor], tokens: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        shape = (_SLOTS, row_bytes(LATENT_DIM, ROPE_DIM))
        cache = torch.randint(0, 120, shape, dtype=torch.uint8, device="cuda")

        def call() -> Callable[[], object]:
            slots = torch.randperm(_SLOTS, device="cuda")[:tokens]
            options = {"kv_lora_rank": LATENT_DIM, "rope_dim": ROPE_DIM, "dtype": torch.bfloat16}
            return partial(function, cache, slots, **options)

        return [call() for _ in range(num_buffers(_bytes(tokens)))]

    return make
