"""Speed of the engine on a CPU, beside its floor and other engines on the same weights, taking turns in one run.

    python -m tests.perf.engine build/checkpoint-280m

Writes build/bench/engine.json, every sample in it, and prints a table. A round measures every engine once, one after
the other; the median of all samples counts. The floor is the roofline's: bytes at the speed at which this machine reads
memory now, or FLOPs at the speed at which torch multiplies large matrices now, whichever takes longer, operation by
operation. Which other engines there are and where they are looked for: `peer`. Of our own a round also measures decode
steps while another process on each core wants 70 % of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.worker.kernel_speed import faster_of
from headrace_kernels.cpu import library

from tests.load.burners import burning
from tests.perf.engine import moe_layer
from tests.perf.engine.hardware import measured_hardware
from tests.perf.engine.llama_cpp import LlamaCpp
from tests.perf.engine.peer import CONTEXT, STEPS, Engine, InProcess, NoPeerError, Samples, Task, medians, peers_dtype
from tests.perf.engine.summary import EXACT, INT8, LOADED, OURS, floors, summary
from tests.perf.engine.table import table
from tests.perf.engine.vllm_cpu import VllmCpu
from tests.perf.machine import machine
from tests.perf.model_bench import PAGE_SIZE, HeadraceEngine, TransformersEngine

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/engine.json")
_FOREIGN_SHARE = 0.7


def _engines(task: Task, peers: Path, options: argparse.Namespace) -> tuple[dict[str, Engine], dict[str, str]]:
    """Return ours and those of the others that are to be had, and why the rest are not."""
    pages = -(-max(task.most_tokens, max(task.batches, default=1) * (CONTEXT + PAGE_SIZE)) // PAGE_SIZE) + 32
    ours = f"{sys.executable} {' '.join(sys.argv)}"
    engines: dict[str, Engine] = {OURS: InProcess(HeadraceEngine(task.checkpoint, pages), ours)}
    if options.exact:
        engines[EXACT] = InProcess(HeadraceEngine(task.checkpoint, pages, Numerics.EXACT), ours)
    if options.int8:
        engines[INT8] = InProcess(HeadraceEngine(task.checkpoint, pages, weights_dtype=WeightsDtype.INT8), ours)
    others: dict[str, Callable[[], Engine]] = {
        "transformers": lambda: InProcess(
            TransformersEngine(task.checkpoint, peers_dtype()), f"transformers in this process, {peers_dtype()}"
        ),
        "llama.cpp": lambda: LlamaCpp(peers, task),
        "vllm": lambda: VllmCpu(peers, task),
    }
    why_not: dict[str, str] = {}
    for name in options.engines:
        try:
            engines[name] = others[name]()
        except NoPeerError as error:
            _leave_out(name, error, why_not)
    return engines, why_not


def _measure(
    engines: dict[str, Engine], why_not: dict[str, str], task: Task, options: argparse.Namespace
) -> tuple[dict[str, list[Samples]], Hardware]:
    """Return samples of every engine by round, and the most that the machine did in any of them.

    A peer that can't do what it is asked leaves `engines` for `why_not`, with all that it had done.
    """
    rounds: dict[str, list[Samples]] = {}
    hardware = measured_hardware(task.threads)
    for number in range(options.rounds):
        for name, engine in list(engines.items()):
            try:
                _one_round(rounds, name, engine, task, number)
            except NoPeerError as error:
                _leave_out(name, error, why_not)
                del engines[name]
                rounds.pop(name, None)
        if options.loaded and task.batches:
            decode_only = Task(task.checkpoint, task.threads, task.batches, [], task.vocab_size)
            with burning(task.threads, share=_FOREIGN_SHARE):
                _one_round(rounds, LOADED, engines[OURS], decode_only, number)
        hardware = faster_of(hardware, measured_hardware(task.threads))
    return rounds, hardware


def _leave_out(name: str, error: NoPeerError, why_not: dict[str, str]) -> None:
    why_not[name] = str(error)
    _log.info("%s is not measured: %s", name, error)


def _one_round(rounds: dict[str, list[Samples]], name: str, engine: Engine, task: Task, number: int) -> None:
    found = engine.one_round(task)
    rounds.setdefault(name, []).append(found)
    shown = {what: round(seconds * 1e3, 2) for what, seconds in medians([found]).items()}
    _log.info("round %d, %s: %s ms", number + 1, name, shown)


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 16, 32])
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--engines", nargs="*", choices=["transformers", "llama.cpp", "vllm"],
                        default=["transformers", "llama.cpp", "vllm"])  # fmt: skip
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder of others' engines")
    parser.add_argument("--exact", action="store_true", help="what --numerics exact costs, too: times of ours")
    parser.add_argument("--int8", action="store_true", help="--weights-dtype int8, too: times of ours")
    parser.add_argument("--loaded", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--moe-layer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, default=_REPORT, help="where the report goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = ModelShape.load(options.checkpoint)
    task = Task(options.checkpoint, options.threads, options.batches, options.prompt_lengths, shape.vocab_size)
    engines, why_not = _engines(task, options.peers, options)
    rounds, hardware = _measure(engines, why_not, task, options)
    commands = {name: engine.command for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    report: dict[str, Any] = {
        "machine": machine(),
        "isa": library.isa() or "none: plain torch",
        "threads": options.threads,
        "rounds": options.rounds,
        "steps_a_round": STEPS,
        "read_gb_per_s": round(hardware.memory_bytes_per_s / 1e9, 1),
        "gflop_per_s": round(hardware.flops[Dtype.BF16] / 1e9),
        "peers_dtype": {"llama.cpp": "bfloat16"} | dict.fromkeys(("vllm", "transformers"), peers_dtype()),
        **summary(rounds, floors(shape, hardware, task.batches, task.lengths), why_not),
        "commands": commands,
        "samples_s": rounds,
    }
    if options.moe_layer:
        report["moe_layer"] = moe_layer.measure(shape, hardware, options.threads, options.peers, options.rounds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    _log.info("%s", table(report))
    _log.info("written to %s", options.json)


if __name__ == "__main__":
    _main()
