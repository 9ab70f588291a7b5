"""Before a wider instruction set is used: does it compute, to the last bit, what the narrower one does?

The order of every sum is the same in all builds (src/simd.h), so results are equal or one of them is wrong. A few small
inputs of each kind of loop tell, in milliseconds, when the library is first asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.cpu import library
from headrace_kernels.routing_rule import RoutedTokens, Router, RoutingRule

_log = logging.getLogger(__name__)

_NARROWER = {"avx512": "avx2"}

_ROWS, _HIDDEN, _WIDTH, _EXPERTS = 13, 70, 35, 6
_HEADS, _LATENT, _ROPE, _NOPE, _VALUE, _PAGE = 7, 48, 10, 18, 20, 16


def settle() -> None:
    """Let kernels run on the narrower instruction set if the wider one computes anything else here."""
    wider = library.isa()
    narrower = _NARROWER.get(wider)
    if narrower is not None and not do_agree(narrower, wider):
        _log.error("compiled kernels for %s and %s disagree here: %s runs; please report it", wider, narrower, narrower)
        library.use(narrower)


def do_agree(first: str, second: str) -> bool:
    """Return whether both instruction sets give the same bits; kernels run on `second` then."""
    found: list[list[Tensor]] = []
    for isa in (first, second):
        library.use(isa)
        found.append([tensor for dtype in (torch.float32, torch.bfloat16) for tensor in _results(dtype)])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _results(dtype: torch.dtype) -> Iterator[Tensor]:
    from headrace_kernels.cpu import (
        experts,
        fp8_experts,
        fp8_linear,
        gqa_decode,
        gqa_prefill,
        int8_experts,
        int8_linear,
        linear,
        mla_decode,
        mla_prefill,
        moe_router,
        panels,
        rms_norm,
        silu_mul,
    )

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, norm, residual = random(_ROWS, _HIDDEN), random(_HIDDEN), random(_ROWS, _WIDTH)
    weight = random(_WIDTH, _HIDDEN)
    packed = panels.pack(weight)
    yield linear.packed_norm_linear(x, norm, packed, 1e-6, random(_WIDTH), _WIDTH)
    yield linear.packed_linear_add(x, packed, residual, None)
    yield linear.linear(x, weight, None)
    yield rms_norm.rms_norm(x, norm, 1e-6)
    yield silu_mul.silu_mul(x)
    rule = RoutingRule(2, "sigmoid", num_groups=3, num_groups_kept=2, is_group_score_top2=True, is_normalised=True)
    router = Router(random(_EXPERTS, _HIDDEN).float(), random(_EXPERTS).float(), rule)
    routed: RoutedTokens = moe_router.route_and_sort(x, norm, 1e-6, router, 1, None, 0, _EXPERTS)
    yield from (routed.x, routed.experts, routed.weights)
    held = experts.empty(_EXPERTS, _HIDDEN, _WIDTH, x)
    for expert in range(_EXPERTS):
        held.put(expert, random(_WIDTH, _HIDDEN), random(_WIDTH, _HIDDEN), random(_HIDDEN, _WIDTH))
    yield held(routed, x)
    in_8_bits = int8_linear.pack(weight)
    yield int8_linear.packed_norm_linear(x, norm, in_8_bits, 1e-6, None, _WIDTH)
    held = int8_experts.empty(_EXPERTS, _HIDDEN, _WIDTH, x)
    for expert in range(_EXPERTS):
        held.put(expert, random(_WIDTH, _HIDDEN), random(_WIDTH, _HIDDEN), random(_HIDDEN, _WIDTH))
    yield held(routed, x)
    block = (16, 32)

    def in_blocks(rows: int, columns: int) -> BlockFp8:
        scales = random(-(-rows // block[0]), -(-columns // block[1])).float()
        return BlockFp8(random(rows, columns).to(torch.float8_e4m3fn), scales, block)

    in_fp8 = fp8_linear.pack(in_blocks(_WIDTH, _HIDDEN), dtype)
    assert in_fp8 is not None, "kernels take both types"
    yield fp8_linear.packed_norm_linear(x, norm, in_fp8, 1e-6, None, _WIDTH)
    yield fp8_linear.packed_linear(x[:3], in_fp8, None, _WIDTH)
    held = fp8_experts.empty(_EXPERTS, _HIDDEN, _WIDTH, x, (block, block))
    for expert in range(_EXPERTS):
        held.put(expert, in_blocks(_WIDTH, _HIDDEN), in_blocks(_WIDTH, _HIDDEN), in_blocks(_HIDDEN, _WIDTH))
    yield held(routed, x)
    table = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], dtype=torch.int32)
    lens = torch.tensor([90, 17], dtype=torch.int32)
    none = {"slots": None, "plan": None, "num_splits": None}
    cache = random(7, _PAGE, _LATENT + _ROPE)
    query = random(2, _HEADS, _LATENT + _ROPE)
    yield mla_decode.mla_decode(query, cache, table, lens, kv_lora_rank=_LATENT, scale=0.1, **none)
    pairs = random(7, 2, _PAGE, 2, _VALUE)
    yield gqa_decode.gqa_decode(random(2, 4, _VALUE), pairs, table, lens, scale=0.1, **none)
    starts = (torch.tensor([0, _ROWS], dtype=torch.int32), torch.tensor([0, 90], dtype=torch.int32))
    w_uk, w_uv = random(_HEADS, _NOPE, _LATENT), random(_HEADS, _VALUE, _LATENT)
    rows = cache.view(-1, _LATENT + _ROPE)[:90]
    yield mla_prefill.mla_prefill(random(_ROWS, _HEADS, _NOPE + _ROPE), rows, w_uk, w_uv, *starts, scale=0.1)
    yield gqa_prefill.gqa_prefill(random(_ROWS, 4, _VALUE), pairs, torch.arange(90), *starts, scale=0.1)
