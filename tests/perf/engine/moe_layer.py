"""One layer of experts alone, its weights cold: ours beside others' kernels for the same, taking turns.

    zentorch    AMD's, looked for as zentorch/bin/python in the folder of peers: a virtual environment that has it
    kt-kernel   for AMX alone; nothing here measures it

Several layers take turns, so that no cache holds their weights. Experts are drawn evenly; shared ones are left out.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_kernels.experts import Experts, empty_experts
from headrace_kernels.routing_rule import RoutedTokens

from tests.perf.engine.asked_process import AskedProcess
from tests.perf.engine.peer import NoPeerError, peers_dtype, threads_of
from tests.perf.machine import cpu_flags

_log = logging.getLogger(__name__)
_SCRIPT = Path(__file__).with_name("zentorch_layer.py")
_TOKENS = (1, 8, 16, 32, 512)
_LAYERS = 4
_CALLS = 12
_START_S = 120.0
_ANSWER_S = 300.0

Chosen = list[list[int]]
"""Experts of each token."""


class _Sizes(NamedTuple):
    hidden: int
    width: int
    num_experts: int
    num_per_token: int


def measure(shape: ModelShape, hardware: Hardware, threads: int, peers: Path, rounds: int) -> dict[str, Any] | None:
    """Return milliseconds by number of tokens, samples, and why a peer is null; None: the network has no experts."""
    if shape.moe is None:
        return None
    sizes = _Sizes(
        shape.hidden_size, shape.moe.intermediate_size, shape.moe.num_experts, shape.moe.num_experts_per_token
    )
    layers = [_our_layer(sizes) for _ in range(_LAYERS)]
    why_not = {"kt-kernel": _no_kt_kernel()}
    try:
        zentorch = _zentorch(sizes, threads, peers)
    except NoPeerError as error:
        zentorch, why_not["zentorch"] = None, str(error)
        _log.info("zentorch is not measured: %s", error)
    samples: dict[str, dict[int, list[float]]] = {"headrace": {}} | ({"zentorch": {}} if zentorch else {})
    floor_ms: dict[int, float] = {}
    for tokens in _TOKENS:
        dice = random.Random(tokens)
        for _ in range(rounds):
            calls = [_choose(sizes, tokens, dice) for _ in range(_CALLS)]
            floor_ms[tokens] = statistics.median(_floor_s(sizes, hardware, each) for each in calls) * 1e3
            ours = [_call_s(layers[i % _LAYERS], each, sizes.hidden) for i, each in enumerate(calls)]
            samples["headrace"].setdefault(tokens, []).extend(ours)
            if zentorch:
                theirs = zentorch.ask({"experts": calls}, most_s=_ANSWER_S)
                samples["zentorch"].setdefault(tokens, []).extend(theirs)
    if zentorch:
        zentorch.close()
    medians = {
        name: {tokens: round(statistics.median(each) * 1e3, 3) for tokens, each in by_tokens.items()}
        for name, by_tokens in samples.items()
    }
    return {
        "floor_ms": {tokens: round(each, 3) for tokens, each in floor_ms.items()},
        "kernels_ms": medians | dict.fromkeys(why_not),
        "not_measured": why_not,
        "dtype": {"headrace": "bfloat16", "zentorch": peers_dtype()},
        "commands": {"zentorch": zentorch.command} if zentorch else {},
        "samples_s": samples,
    }


def _our_layer(sizes: _Sizes) -> Experts:
    hidden, width = sizes.hidden, sizes.width
    experts = empty_experts(sizes.num_experts, hidden, width, torch.empty(0, dtype=torch.bfloat16))
    for number in range(sizes.num_experts):
        gate_up = torch.randn(2, width, hidden).mul_(hidden**-0.5).bfloat16()
        experts.put(number, *gate_up, torch.randn(hidden, width).mul_(width**-0.5).bfloat16())
    return experts


def _zentorch(sizes: _Sizes, threads: int, peers: Path) -> AskedProcess:
    python = peers / "zentorch" / "bin" / "python"
    if not python.exists():
        raise NoPeerError(f"{python} is not there: a virtual environment with zentorch")
    shown = map(str, (*sizes[:3], _LAYERS))
    return AskedProcess([python, _SCRIPT, *shown, peers_dtype()], threads_of(threads), start_s=_START_S)


def _no_kt_kernel() -> str:
    if "amx_bf16" in cpu_flags():
        return "no adapter for it was written"
    return "it is for AMX, which this processor has not"


def _choose(sizes: _Sizes, tokens: int, dice: random.Random) -> Chosen:
    return [dice.sample(range(sizes.num_experts), sizes.num_per_token) for _ in range(tokens)]


def _floor_s(sizes: _Sizes, hardware: Hardware, chosen: Chosen) -> float:
    one = 3 * sizes.hidden * sizes.width
    read = len({expert for each in chosen for expert in each}) * one * Dtype.BF16.itemsize
    flops = 2 * one * sum(map(len, chosen))
    return max(read / hardware.memory_bytes_per_s, flops / hardware.flops_per_s(Dtype.BF16))


def _call_s(layer: Experts, chosen: Sequence[Sequence[int]], hidden: int) -> float:
    ids = torch.tensor(chosen)
    x = torch.randn(len(ids), hidden).bfloat16()
    routed = RoutedTokens(x, ids, torch.full(ids.shape, 1 / ids.shape[1]), None)
    begin = time.perf_counter()
    layer(routed, x)
    return time.perf_counter() - begin
