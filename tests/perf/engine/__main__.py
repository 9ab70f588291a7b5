"""Speed of the engine on a CPU, beside its floor and other engines on the same weights, taking turns in one run.

    python -m tests.perf.engine build/checkpoint-280m

Writes build/bench/engine.json and prints a table. A round measures every engine once, one after the other; the median
of the rounds counts. The floor is the roofline's: bytes at the speed at which this machine reads memory now, or FLOPs
at the speed at which torch multiplies large matrices now, whichever takes longer, operation by operation. An engine
that is not to be had here is null: llama.cpp is what lies in .peers/llama.cpp (`llama_cpp`).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from headrace_core.model.numerics import Numerics
from headrace_core.roofline.communication import ONE_GPU
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.hardware_measure import best_of, cpu_hardware, read_bytes_per_s
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.roofline import decode_step_s, prefill_s
from headrace_kernels.cpu import library

from tests.perf.engine.llama_cpp import LlamaCpp
from tests.perf.machine import machine
from tests.perf.model_bench import DECODE_CONTEXT, PAGE_SIZE, HeadraceEngine, TransformersEngine, random_prompts

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/engine.json")
_READ_BYTES = 1 << 29
_SQUARE = 2048
_STEPS = 7
_EXACT = "headrace --numerics exact"

Figures = dict[str, float]
"""Seconds by name: "decode 16" of a step at a batch, "prefill 512" of a prompt."""


def measured_hardware(threads: int) -> Hardware:
    """Return what this machine does now, on so many threads."""
    squares = [torch.randn(_SQUARE, _SQUARE).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    flops = 2 * _SQUARE**3 / min(best_of(lambda each=each: each @ each, 2) for each in squares[: _num_fast_dtypes()])
    read = read_bytes_per_s(_READ_BYTES, num_threads=threads, repeats=3)
    return cpu_hardware({Dtype.BF16: flops}, memory_bytes_per_s=read, copy_bytes_per_s=read / 2, source="measured now")


def _num_fast_dtypes() -> int:
    # Where the processor has no bfloat16, torch multiplies it a hundred times slower than float32.
    return 2 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 1


def floor(shape: ModelShape, hardware: Hardware, batches: Sequence[int], lengths: Sequence[int]) -> Figures:
    """Return the least seconds that each thing measured can take."""
    tokens = DECODE_CONTEXT + 2
    decode = {
        f"decode {batch}": decode_step_s(shape, hardware, ONE_GPU, batch=batch, context_tokens_total=batch * tokens)
        for batch in batches
    }
    return decode | {f"prefill {length}": prefill_s(shape, hardware, ONE_GPU, new_tokens=length) for length in lengths}


def one_round(engine: Any, batches: Sequence[int], lengths: Sequence[int], vocab_size: int) -> Figures:
    """Return the seconds that `engine` takes now; a decode step's are the median of some."""
    found: Figures = {}
    for batch in batches:
        prompts = random_prompts(batch, DECODE_CONTEXT, vocab_size)
        tokens = [prompt[0] for prompt in prompts]
        engine.prefill(prompts)
        engine.decode(tokens)
        found[f"decode {batch}"] = statistics.median(_seconds(engine.decode, tokens) for _ in range(_STEPS))
    for length in lengths:
        prompts = random_prompts(1, length, vocab_size)
        found[f"prefill {length}"] = _seconds(engine.prefill, prompts)
    return found


def _seconds(run: Callable[[Any], None], argument: object) -> float:
    begin = time.perf_counter()
    run(argument)
    return time.perf_counter() - begin


def summary(rounds: dict[str, list[Figures]], least: Figures) -> dict[str, Any]:
    """Return medians by engine, and how ours stand to the best of the others and to the floor."""
    medians = {
        name: {what: statistics.median(each[what] for each in found) for what in found[0]}
        for name, found in rounds.items()
        if found
    }
    ours = medians["headrace"]
    report: dict[str, Any] = {"floor_ms": _ms(least), "engines_ms": {name: _ms(each) for name, each in medians.items()}}
    report["engines_ms"] |= {name: None for name in rounds if name not in medians}
    for what, seconds in ours.items():
        others = {name: each[what] for name, each in medians.items() if name not in ("headrace", _EXACT)}
        key = what.replace("decode ", "decode_b").replace("prefill ", "prefill_")
        report[f"{key}_vs_floor"] = round(seconds / least[what], 2)
        best = min(others, key=lambda name: others[name], default=None)
        # In decode the ratio of times, in prefill of rates: below 1 and above 1 is ahead.
        ratio = None if best is None else seconds / others[best] if "decode" in what else others[best] / seconds
        report[f"{key}_vs_best"] = None if ratio is None else round(ratio, 3)
        report[f"{key}_best"] = best
    if _EXACT in medians:
        report["exact_cost"] = {what: round(medians[_EXACT][what] / seconds, 2) for what, seconds in ours.items()}
    return report


def _ms(figures: Figures) -> Figures:
    return {name: round(seconds * 1e3, 2) for name, seconds in figures.items()}


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 16, 32])
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--engines", nargs="*", default=["transformers", "llama.cpp"])
    parser.add_argument("--exact", action="store_true", help="what --numerics exact costs, too: times of ours")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches, lengths = options.batches, options.prompt_lengths
    shape = ModelShape.load(options.checkpoint)
    pages = -(-max([*lengths, max(batches, default=1) * (DECODE_CONTEXT + PAGE_SIZE)]) // PAGE_SIZE) + 32
    engines: dict[str, Any] = {"headrace": HeadraceEngine(options.checkpoint, pages)}
    rounds: dict[str, list[Figures]] = {name: [] for name in ["headrace", *options.engines]}
    if options.exact:
        engines[_EXACT], rounds[_EXACT] = HeadraceEngine(options.checkpoint, pages, Numerics.EXACT), []
    if "transformers" in options.engines:
        engines["transformers"] = TransformersEngine(options.checkpoint)
    llama = LlamaCpp.find(options.checkpoint, options.threads) if "llama.cpp" in options.engines else None
    hardware: list[Hardware] = []
    for number in range(options.rounds):
        hardware.append(measured_hardware(options.threads))
        for name, engine in engines.items():
            rounds[name].append(one_round(engine, batches, lengths, shape.vocab_size))
            _log.info("round %d, %s: %s ms", number + 1, name, _ms(rounds[name][-1]))
        if llama is not None:
            rounds["llama.cpp"].append(llama.one_round(batches, lengths, DECODE_CONTEXT))
            _log.info("round %d, llama.cpp: %s ms", number + 1, _ms(rounds["llama.cpp"][-1]))
    best = max(hardware, key=lambda each: each.memory_bytes_per_s)
    report = {
        "machine": machine(),
        "isa": library.isa() or "none: plain torch",
        "threads": options.threads,
        "rounds": options.rounds,
        "read_gb_per_s": round(best.memory_bytes_per_s / 1e9, 1),
        "gflop_per_s": round(max(each.flops[Dtype.BF16] for each in hardware) / 1e9),
        **summary(rounds, floor(shape, best, batches, lengths)),
    }
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=1) + "\n")
    _log.info(json.dumps(report, indent=1))


if __name__ == "__main__":
    _main()
