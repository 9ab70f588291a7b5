"""Absorbed latent attention of decode rows over 64-token pages, bf16 and fp8 rows, alone and with W_UV."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from headrace_kernels.gpu.configs import Config
from headrace_kernels.latent_fp8 import pack_latents, row_bytes
from headrace_kernels.mla_decode import mla_decode, mla_decode_values, plan_mla_decode
from headrace_kernels.split_ranges import SplitPlan
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

HEADS = {"V2-Lite": 16, "K2": 64, "V3": 128}
# Best of three inference engines on an H200, bf16, us by heads, batch and context; NVIDIA ai-dynamo/aiconfigurator
# at 095f58a51, h200_sxm generation_mla_perf.
PUBLISHED_US = {
    (16, 1, 4096): 18.4,
    (16, 32, 4096): 54.0,
    (16, 128, 4096): 154.0,
    (16, 32, 32768): 291.0,
    (64, 32, 4096): 62.0,
    (64, 128, 4096): 163.0,
    (64, 32, 32768): 304.0,
    (128, 1, 4096): 20.8,
    (128, 32, 4096): 85.0,
    (128, 128, 4096): 261.0,
    (128, 32, 32768): 468.0,
}
_SOURCE = "aiconfigurator 095f58a51, h200_sxm generation_mla_perf, best of its engines"
_LATENT, _ROPE, _VALUE, _PAGE = 512, 64, 128, 64
_SCALE = 192**-0.5


def cases() -> list[BenchCase]:
    """Every cell of the published table in bf16; fp8 rows and W_UV where they matter."""
    attention = [_case(*cell, is_fp8=False) for cell in PUBLISHED_US]
    quantised = [_case(*cell, is_fp8=True) for cell in ((16, 128, 4096), (128, 128, 4096))]
    return attention + quantised + [_values_case(*cell) for cell in ((16, 1, 4096), (128, 1, 4096), (128, 128, 4096))]


def tuning() -> list[TuningCase]:
    """Tiles by heads of a program and bits of a cache element."""
    found: list[TuningCase] = []
    for num_heads, is_fp8 in product((16, 128), (False, True)):
        row = (_LATENT + _ROPE) * (1 if is_fp8 else 2)
        changes: list[Config] = [
            {"BLOCK_N": tokens, "num_warps": warps, "num_stages": stages}
            for tokens, warps, stages in product((64, 32), (4, 8), (2, 3, 4))
            if fits(warps, shared_bytes=tokens * row * stages)
        ]
        key = f"heads {min(num_heads, 64)}, {8 if is_fp8 else 16} bits"
        found.append(("mla_decode", key, changes, _case(num_heads, 32, 4096, is_fp8=is_fp8)))
    return found


def _case(num_heads: int, batch: int, context: int, *, is_fp8: bool) -> BenchCase:
    return BenchCase(
        family="mla_decode",
        shape=f"H={num_heads} B={batch} context={context} {'fp8' if is_fp8 else 'bf16'}",
        calls=_calls(num_heads, batch, context, is_fp8=is_fp8, with_values=False),
        bytes_moved=_bytes(num_heads, batch, context, is_fp8=is_fp8),
        flops=_flops(num_heads, batch, context),
        published_us=None if is_fp8 else PUBLISHED_US.get((num_heads, batch, context)),
        published_source=_SOURCE,
    )


def _values_case(num_heads: int, batch: int, context: int) -> BenchCase:
    """Beside attention by the same kernel and the W_UV product as a batched matrix product of torch."""
    return BenchCase(
        family="mla_decode",
        shape=f"with W_UV H={num_heads} B={batch} context={context} bf16",
        calls=_calls(num_heads, batch, context, is_fp8=False, with_values=True),
        bytes_moved=_bytes(num_heads, batch, context, is_fp8=False) + 2.0 * num_heads * _VALUE * _LATENT,
        flops=_flops(num_heads, batch, context) + 2.0 * batch * num_heads * _VALUE * _LATENT,
        peers={"torch W_UV": _calls(num_heads, batch, context, is_fp8=False, with_values=True, is_torch_product=True)},
    )


def _bytes(num_heads: int, batch: int, context: int, *, is_fp8: bool) -> float:
    row = row_bytes(_LATENT, _ROPE) if is_fp8 else 2 * (_LATENT + _ROPE)
    queries_and_latents = 2 * num_heads * (2 * _LATENT + _ROPE)
    return float(batch * (context * row + queries_and_latents + 4 * -(-context // _PAGE)))


def _flops(num_heads: int, batch: int, context: int) -> float:
    return 2.0 * batch * num_heads * context * (2 * _LATENT + _ROPE)


def _calls(
    num_heads: int, batch: int, context: int, *, is_fp8: bool, with_values: bool, is_torch_product: bool = False
) -> Calls:
    def run(query: Tensor, cache: Tensor, table: Tensor, lens: Tensor, w_uv: Tensor, plan: SplitPlan | None) -> Tensor:
        if with_values and not is_torch_product:
            return mla_decode_values(query, cache, table, lens, w_uv, scale=_SCALE, plan=plan)
        latents = mla_decode(query, cache, table, lens, kv_lora_rank=_LATENT, scale=_SCALE, plan=plan)
        return torch.bmm(latents.transpose(0, 1), w_uv.transpose(1, 2)) if with_values else latents

    def make() -> list[Callable[[], object]]:
        pages = -(-context // _PAGE)
        lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        # A plan is made once a step, not once a layer.
        plan = plan_mla_decode(lens, _PAGE, num_heads)
        calls: list[Callable[[], object]] = []
        for _ in range(num_buffers(_bytes(num_heads, batch, context, is_fp8=is_fp8))):
            cache = torch.randn(batch * pages, _PAGE, _LATENT + _ROPE, device="cuda").to(torch.bfloat16)
            cache = pack_latents(cache, _LATENT, _ROPE) if is_fp8 else cache
            table = torch.randperm(batch * pages, device="cuda").view(batch, pages).to(torch.int32)
            query = torch.randn(batch, num_heads, _LATENT + _ROPE, device="cuda").to(torch.bfloat16)
            w_uv = torch.randn(num_heads, _VALUE, _LATENT, device="cuda").to(torch.bfloat16)
            calls.append(partial(run, query, cache, table, lens, w_uv, plan))
        return calls

    return make
