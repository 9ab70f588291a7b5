"""Calls of the kernel families at one shape each, with what bounds them: for `kernel_speed`.

Sizes are those of a small DeepSeek-V3 and of a small Mixtral, of a decode step of 16 sequences or of a prompt of 256
tokens. Bytes and FLOPs are what can't be avoided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.draws import Draws
from headrace_kernels.experts import empty_experts
from headrace_kernels.gqa_decode import gqa_decode
from headrace_kernels.gqa_prefill import gqa_prefill
from headrace_kernels.latent_store import latent_norm_rope_store
from headrace_kernels.linear import Linear
from headrace_kernels.mla_decode import mla_decode, mla_decode_values
from headrace_kernels.mla_prefill import mla_prefill
from headrace_kernels.mla_prologue import mla_prologue
from headrace_kernels.moe_router import route_and_sort
from headrace_kernels.rms_norm import rms_norm
from headrace_kernels.rope import rope
from headrace_kernels.routing_rule import RoutedTokens, Router, RoutingRule
from headrace_kernels.sampling import sample_tokens
from headrace_kernels.silu_mul import silu_mul
from torch import Tensor

_B, _CONTEXT, _PAGE = 16, 1024, 64
_PROMPT = 256
_N, _WIDTH, _E, _K = 1024, 512, 32, 4
_H, _D, _R, _NOPE, _DV = 16, 512, 64, 64, 64
_QUERY_HEADS, _KV_HEADS, _HEAD = 32, 8, 128
_VOCABULARY = 32_000
_EPS = 1e-6
_BLOCK, _FP8_MOST = 128, 448.0

Call = Callable[[], object]


@dataclass(frozen=True)
class KernelCase:
    """`make` returns a call on bfloat16 inputs of its own (logits: float32), made for the backend that is in force."""

    family: str
    shape: str
    num_bytes: float
    flops: float
    make: Callable[[], Call]


def kernel_cases() -> list[KernelCase]:
    """Return a case of each family that can run on a CPU by kernels of its own; of a linear layer two."""
    weights, latents = _N * _N, _D + _R
    active = _E * (1 - (1 - _K / _E) ** _B)
    expert = 3 * _N * _WIDTH
    pairs = _PROMPT * (_PROMPT + 1) / 2
    rows, w_u = _B * _CONTEXT, _H * _DV * _D
    grouped_row = 2 * _KV_HEADS * _HEAD
    decode = f"{_B} sequences of {_CONTEXT} tokens"
    heads = f"{_H} heads, latents of {_D} + {_R}"
    grouped = f"{_QUERY_HEADS} heads, {_KV_HEADS} of keys and values"
    prompt = f"{_PROMPT} tokens"
    return [
        KernelCase("linear", f"{_B} × {_N}, {_N} outputs", 2.0 * weights, 2.0 * _B * weights, lambda: _linear(_B)),
        KernelCase("linear", f"{_PROMPT} × {_N}, {_N} outputs", 2.0 * (weights + 2 * _PROMPT * _N),
                   2.0 * _PROMPT * weights, lambda: _linear(_PROMPT)),
        KernelCase("experts", f"{_B} tokens, {_K} of {_E} experts of {_N} × {_WIDTH}", 2.0 * active * expert,
                   2.0 * _B * _K * expert, _experts),
        KernelCase("int8_linear", f"{_B} × {_N}, {_N} outputs", 1.0 * weights, 2.0 * _B * weights,
                   lambda: _linear(_B, is_int8=True)),
        KernelCase("int8_experts", f"{_B} tokens, {_K} of {_E} experts of {_N} × {_WIDTH}", 1.0 * active * expert,
                   2.0 * _B * _K * expert, lambda: _experts(is_int8=True)),
        KernelCase("fp8_linear", f"{_B} × {_N}, {_N} outputs", 1.0 * weights, 2.0 * _B * weights,
                   lambda: _linear(_B, is_fp8=True)),
        KernelCase("fp8_experts", f"{_B} tokens, {_K} of {_E} experts of {_N} × {_WIDTH}", 1.0 * active * expert,
                   2.0 * _B * _K * expert, lambda: _experts(is_fp8=True)),
        KernelCase("moe_router", f"{_B} tokens, {_E} experts", 4.0 * _E * _N + 4.0 * _B * _N, 2.0 * _B * _E * _N,
                   _router),
        KernelCase("mla_decode", f"{decode}, {heads}", 2.0 * rows * latents, 2.0 * _H * rows * (2 * _D + _R),
                   lambda: _mla_decode(with_values=False)),
        KernelCase("mla_decode_values", f"{decode}, {heads}", 2.0 * (rows * latents + w_u),
                   2.0 * _H * rows * (2 * _D + _R) + 2.0 * _B * w_u, lambda: _mla_decode(with_values=True)),
        KernelCase("mla_prologue", f"{_B} tokens, {heads}", 2.0 * w_u, 2.0 * _B * w_u, _mla_prologue),
        KernelCase("mla_prefill", f"{prompt}, {heads}", 2.0 * (2 * w_u + _PROMPT * latents),
                   4.0 * _PROMPT * w_u + 2.0 * _H * pairs * (_NOPE + _R + _DV), _mla_prefill),
        KernelCase("latent_store", f"{prompt}, latents of {_D} + {_R}", 4.0 * _PROMPT * latents, 0.0, _latent_store),
        KernelCase("gqa_decode", f"{decode}, {grouped}", 2.0 * rows * grouped_row, 4.0 * rows * _QUERY_HEADS * _HEAD,
                   _gqa_decode),
        KernelCase("gqa_prefill", f"{prompt}, {grouped}", 2.0 * _PROMPT * (grouped_row + 2 * _QUERY_HEADS * _HEAD),
                   4.0 * pairs * _QUERY_HEADS * _HEAD, _gqa_prefill),
        KernelCase("rms_norm", f"{prompt} of {_N}", 4.0 * _PROMPT * _N, 0.0, _rms_norm),
        KernelCase("rope", f"{prompt}, {_H} heads of {_R}", 4.0 * _PROMPT * _H * _R, 0.0, _rope),
        KernelCase("silu_mul", f"{prompt} of {_WIDTH}", 6.0 * _PROMPT * _WIDTH, 0.0, _silu_mul),
        KernelCase("sampling", f"{_B} rows of {_VOCABULARY}, top-p", 8.0 * _B * _VOCABULARY, 0.0, _sampling),
    ]  # fmt: skip


def _random(*shape: int) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).bfloat16()


def _random_fp8(rows: int, columns: int) -> BlockFp8:
    values = (torch.randn(rows, columns) * 60).clamp(-_FP8_MOST, _FP8_MOST).to(torch.float8_e4m3fn)
    scales = torch.full((rows // _BLOCK, columns // _BLOCK), columns**-0.5 / 60)
    return BlockFp8(values, scales, (_BLOCK, _BLOCK))


def _linear(rows: int, *, is_int8: bool = False, is_fp8: bool = False) -> Call:
    weight, x = _random_fp8(_N, _N) if is_fp8 else _random(_N, _N), _random(rows, _N)
    layer = Linear(weight, is_int8=is_int8, dtype=x.dtype)
    return lambda: layer(x)


def _experts(*, is_int8: bool = False, is_fp8: bool = False) -> Call:
    blocks, make = ((_BLOCK, _BLOCK), (_BLOCK, _BLOCK)), _random_fp8 if is_fp8 else _random
    layer = empty_experts(_E, _N, _WIDTH, _random(1), is_int8=is_int8, fp8_blocks=blocks if is_fp8 else None)
    for number in range(_E):
        layer.put(number, make(_WIDTH, _N), make(_WIDTH, _N), make(_N, _WIDTH))
    chosen = torch.stack([torch.randperm(_E)[:_K] for _ in range(_B)])
    routed = RoutedTokens(_random(_B, _N), chosen, torch.full((_B, _K), 1 / _K), None)
    return lambda: layer(routed, routed.x)


def _router() -> Call:
    router = Router(torch.randn(_E, _N) * _N**-0.5, torch.zeros(_E), RoutingRule(_K, "sigmoid"))
    x, norm_weight = _random(_B, _N), torch.ones(_N, dtype=torch.bfloat16)
    return lambda: route_and_sort(x, norm_weight, _EPS, router, None)


def _pages() -> tuple[Tensor, Tensor]:
    """Return a block table of pages in random order, and the lengths of the contexts."""
    count = _CONTEXT // _PAGE
    table = torch.randperm(_B * count).to(torch.int32).view(_B, count)
    return table, torch.full((_B,), _CONTEXT, dtype=torch.int32)


def _mla_decode(*, with_values: bool) -> Call:
    cache, query = _random(_B * _CONTEXT // _PAGE, _PAGE, _D + _R), _random(_B, _H, _D + _R)
    table, lengths = _pages()
    if not with_values:
        return lambda: mla_decode(query, cache, table, lengths, kv_lora_rank=_D, scale=0.1)
    w_uv = _random(_H, _DV, _D)
    return lambda: mla_decode_values(query, cache, table, lengths, w_uv, scale=0.1)


def _rotation(count: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(count, _R // 2) * 1000
    return angles.cos(), angles.sin()


def _mla_prologue() -> Call:
    query, w_uk = _random(_B, _H, _NOPE + _R), _random(_H, _NOPE, _D)
    new, cache = (_random(_B, _D), _random(_B, _R)), torch.zeros(_B * _PAGE, _D + _R, dtype=torch.bfloat16)
    norm_weight, slots, turns = torch.ones(_D, dtype=torch.bfloat16), torch.arange(_B) * _PAGE, _rotation(_B)
    return lambda: mla_prologue(query, w_uk, *new, norm_weight, *turns, cache, slots, eps=_EPS, is_interleaved=True)


def _latent_store() -> Call:
    new, cache = (_random(_PROMPT, _D), _random(_PROMPT, _R)), torch.zeros(_PROMPT, _D + _R, dtype=torch.bfloat16)
    norm_weight, slots, turns = torch.ones(_D, dtype=torch.bfloat16), torch.arange(_PROMPT), _rotation(_PROMPT)
    return lambda: latent_norm_rope_store(*new, norm_weight, *turns, cache, slots, eps=_EPS, is_interleaved=True)


def _mla_prefill() -> Call:
    query, rows = _random(_PROMPT, _H, _NOPE + _R), _random(_PROMPT, _D + _R)
    weights = _random(_H, _NOPE, _D), _random(_H, _DV, _D)
    starts = torch.tensor([0, _PROMPT], dtype=torch.int32)
    return lambda: mla_prefill(query, rows, *weights, starts, starts, scale=0.1)


def _gqa_decode() -> Call:
    cache = _random(_B * _CONTEXT // _PAGE, 2, _PAGE, _KV_HEADS, _HEAD)
    query, (table, lengths) = _random(_B, _QUERY_HEADS, _HEAD), _pages()
    return lambda: gqa_decode(query, cache, table, lengths, scale=0.1)


def _gqa_prefill() -> Call:
    query, cache = _random(_PROMPT, _QUERY_HEADS, _HEAD), _random(_PROMPT // _PAGE, 2, _PAGE, _KV_HEADS, _HEAD)
    slots, starts = torch.arange(_PROMPT), torch.tensor([0, _PROMPT], dtype=torch.int32)
    return lambda: gqa_prefill(query, cache, slots, starts, starts, scale=0.1)


def _rms_norm() -> Call:
    x, weight = _random(_PROMPT, _N), torch.ones(_N, dtype=torch.bfloat16)
    return lambda: rms_norm(x, weight, _EPS)


def _rope() -> Call:
    x, turns = _random(_PROMPT, _H, _R), _rotation(_PROMPT)
    return lambda: rope(x, *turns, is_interleaved=True)


def _silu_mul() -> Call:
    gate_up = _random(_PROMPT, 2 * _WIDTH)
    return lambda: silu_mul(gate_up)


def _sampling() -> Call:
    logits, one = torch.randn(_B, _VOCABULARY) * 4, torch.ones(_B, dtype=torch.float64)
    none = torch.zeros(_B, dtype=torch.int64)
    draws = Draws(
        temperatures=one, top_k=none, top_p=0.9 * one, min_p=0.0 * one, seeds=none, sample_indices=none, positions=none
    )
    return lambda: sample_tokens(logits, draws)
