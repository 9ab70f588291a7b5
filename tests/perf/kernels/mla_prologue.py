"""The prologue of latent decode attention, beside its parts in torch: bmm, norm, rotation and store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from headrace_kernels.gpu.configs import Config
from headrace_kernels.gpu.mla_prologue import config_key
from headrace_kernels.mla_prologue import mla_prologue
from headrace_kernels.rope import rope_ref
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

NOPE_DIM, ROPE_DIM, LATENT_DIM = 128, 64, 512
HEADS = {"V2-Lite": 16, "Kimi-K2": 64, "V3": 128}
ROWS = (1, 32, 128)
_SLOTS = 64 * 4096
_EPS = 1e-6
# Only the product with W_UK: aiconfigurator 095f58a51, BMM on an H200 SXM, 128 heads, bfloat16.
_PUBLISHED_BMM_US = {1: 5.9, 128: 10.2}


def cases() -> list[BenchCase]:
    """Every model at every batch size."""
    return [_case(name, rows) for name in HEADS for rows in ROWS]


def tuning() -> list[TuningCase]:
    """Tiles of weights and of rows; one choice for all batch sizes, made at 32 rows."""
    found: list[TuningCase] = []
    for name, heads in HEADS.items():
        changes: list[Config] = [
            {"BLOCK_B": rows, "BLOCK_D": columns, "num_warps": num_warps}
            for rows in (16, 32, 64)
            for columns in (64, 128, 256)
            for num_warps in (4, 8)
            if fits(num_warps, shared_bytes=4 * NOPE_DIM * (rows + columns), values=rows * columns)
        ]
        found.append(("mla_prologue", config_key(heads, torch.bfloat16), changes, _case(name, 32)))
    return found


def _case(name: str, rows: int) -> BenchCase:
    heads = HEADS[name]
    queries = rows * heads * (NOPE_DIM + LATENT_DIM + 2 * ROPE_DIM)
    weights = heads * NOPE_DIM * LATENT_DIM
    return BenchCase(
        family="mla_prologue",
        shape=f"{name} B={rows} H={heads}",
        calls=_calls(_ours, heads, rows),
        bytes_moved=2.0 * (weights + queries + 2 * rows * (LATENT_DIM + ROPE_DIM)),
        flops=2.0 * rows * weights,
        peers={"torch": _calls(_torch, heads, rows)},
        published_us=_PUBLISHED_BMM_US.get(rows) if name == "V3" else None,
        published_source="the W_UK product alone, aiconfigurator",
    )


def _calls(function: Callable[..., Tensor], heads: int, rows: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        cache = torch.zeros(_SLOTS, LATENT_DIM + ROPE_DIM, dtype=torch.bfloat16, device="cuda")
        turn = torch.rand(rows, ROPE_DIM // 2, device="cuda") * 1000
        slots = torch.randperm(_SLOTS, device="cuda")[:rows]
        calls: list[Callable[[], object]] = []
        for _ in range(num_buffers(2.0 * heads * NOPE_DIM * LATENT_DIM)):
            query, w_uk = random(rows, heads, NOPE_DIM + ROPE_DIM), random(heads, NOPE_DIM, LATENT_DIM)
            new: tuple[Tensor, ...] = random(rows, LATENT_DIM + ROPE_DIM).split([LATENT_DIM, ROPE_DIM], dim=1)
            calls.append(partial(function, query, w_uk, *new, random(LATENT_DIM), turn.cos(), turn.sin(), cache, slots))
        return calls

    return make


def _ours(*arguments: Tensor) -> Tensor:
    return mla_prologue(*arguments, eps=_EPS, is_interleaved=True)


def _torch(
    query: Tensor,
    w_uk: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    key = rope_ref(k_pe[:, None], cos, sin, is_interleaved=True)[:, 0]
    latent = F.rms_norm(c_kv, norm_weight.shape, norm_weight, _EPS)
    cache.index_copy_(0, slot_mapping, torch.cat((latent, key), dim=1))
    absorbed = torch.bmm(query[..., :NOPE_DIM].transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((absorbed, rope_ref(query[..., NOPE_DIM:], cos, sin, is_interleaved=True)), dim=2)
