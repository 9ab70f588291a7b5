"""Grouped-query attention of Mixtral's decode rows over 64-token pages, beside torch's attention without pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from headrace_kernels.gpu.configs import Config
from headrace_kernels.gqa_decode import gqa_decode, plan_gqa_decode
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

_HEADS, _GROUPS, _DIM, _PAGE = 32, 8, 128, 64
_SCALE = _DIM**-0.5


def cases() -> list[BenchCase]:
    """One row, a usual batch, a large one, long contexts."""
    return [_case(batch, context) for batch, context in ((1, 4096), (32, 4096), (128, 4096), (8, 32768))]


def tuning() -> list[TuningCase]:
    """Tiles for heads of 128."""
    changes: list[Config] = [
        {"BLOCK_N": tokens, "num_warps": warps, "num_stages": stages}
        for tokens, warps, stages in product((64, 32), (2, 4, 8), (2, 3, 4))
        if fits(warps, shared_bytes=4 * _DIM * tokens * stages)
    ]
    return [("gqa_decode", f"width {_DIM}, 16 bits", changes, _case(32, 4096))]


def _case(batch: int, context: int) -> BenchCase:
    return BenchCase(
        family="gqa_decode",
        shape=f"Mixtral H={_HEADS} G={_GROUPS} B={batch} context={context} bf16",
        calls=_calls(batch, context),
        bytes_moved=_bytes(batch, context),
        flops=4.0 * batch * context * _HEADS * _DIM,
        peers={"torch SDPA, no pages": _sdpa_calls(batch, context)},
    )


def _bytes(batch: int, context: int) -> float:
    return float(batch * (context * 4 * _GROUPS * _DIM + 4 * _HEADS * _DIM + 4 * -(-context // _PAGE)))


def _calls(batch: int, context: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        pages = -(-context // _PAGE)
        lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        # A plan is made once a step, not once a layer.
        plan = plan_gqa_decode(lens, _PAGE, _GROUPS)
        calls: list[Callable[[], object]] = []
        for _ in range(num_buffers(_bytes(batch, context))):
            cache = _random(batch * pages, 2, _PAGE, _GROUPS, _DIM)
            table = torch.randperm(batch * pages, device="cuda").view(batch, pages).to(torch.int32)
            query = _random(batch, _HEADS, _DIM)
            calls.append(partial(gqa_decode, query, cache, table, lens, scale=_SCALE, plan=plan))
        return calls

    return make


def _sdpa_calls(batch: int, context: int) -> Calls:
    def make() -> list[Callable[[], object]]:
        def call() -> Callable[[], object]:
            query = _random(batch, _HEADS, 1, _DIM)
            key, value = (_random(batch, _GROUPS, context, _DIM) for _ in range(2))
            return partial(F.scaled_dot_product_attention, query, key, value, scale=_SCALE, enable_gqa=True)

        return [call() for _ in range(num_buffers(_bytes(batch, context)))]

    return make


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")
