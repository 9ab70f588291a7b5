"""What weights that stay in FP8 cost and save on a CPU: the 280M checkpoint in blocks of FP8, held in three ways.

    python -m tests.perf.fp8_weights build/checkpoint-280m build/checkpoint-280m-fp8

Loading is measured in a process of its own for each, in turn: CPU seconds, memory then and at most. Steps are taken
by all three in one process, in turn, on one thread; CPU time, medians: what else the machine does hardly counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from headrace_core.model.load import load_model
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.tiny_checkpoints import quantise_fp8, write_config, write_tensors
from safetensors.torch import load_file

from tests.perf.checkpoint_280m import CONFIG, write
from tests.perf.model_bench import DECODE_CONTEXT, MIB, HeadraceEngine, random_prompts

HELD = list(WeightsDtype)
BATCHES = (1, 8, 16)
PROMPTS = (16, 512)
_BLOCK = (128, 128)

_log = logging.getLogger(__name__)


def write_fp8(plain: Path, directory: Path) -> Path:
    """Write the checkpoint of `plain` in blocks of FP8 into `directory` unless it is there."""
    if not (directory / "model.safetensors").exists():
        quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(_BLOCK)}
        write_config(directory, {**CONFIG, "quantization_config": quantisation})
        tensors = {name: tensor.float() for name, tensor in load_file(write(plain) / "model.safetensors").items()}
        stored, _ = quantise_fp8(tensors, _BLOCK)
        is_fp8 = {name for name in stored if name + "_scale_inv" in stored}
        kept = {*is_fp8, *(name + "_scale_inv" for name in is_fp8)}
        write_tensors(
            directory,
            {
                name: tensor if name in kept or name.endswith("bias") else tensor.bfloat16()
                for name, tensor in stored.items()
            },
        )
    return directory


def bench_load(directory: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return by how weights are held the medians of CPU seconds to load, and of MiB after it and at most."""
    found: dict[str, list[dict[str, float]]] = {held.value: [] for held in HELD}
    for _ in range(rounds):
        for held in HELD:
            command = [sys.executable, "-m", "tests.perf.fp8_weights", str(directory), str(directory)]
            done = subprocess.run([*command, "--load", held.value], check=True, capture_output=True, text=True)
            found[held.value].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]} for name, runs in found.items()
    }


def _load(directory: Path, held: WeightsDtype) -> dict[str, float]:
    torch.set_num_threads(1)
    before_mib, began = _status_mib("VmRSS"), time.process_time()
    model = load_model(directory, weights_dtype=held)
    return {
        "cpu_s": round(time.process_time() - began, 2),
        "grown_mib": round(_status_mib("VmRSS") - before_mib, 1),
        "peak_mib": round(_status_mib("VmHWM"), 1),
        "said_mib": round(model.weight_bytes / MIB, 1),
    }


def bench_steps(directory: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return by the kind of step the median CPU milliseconds of each."""
    torch.set_num_threads(1)
    engines = {held.value: HeadraceEngine(directory, 128, weights_dtype=held) for held in HELD}
    found: dict[str, dict[str, float]] = {}
    for length in PROMPTS:
        prompts = random_prompts(1, length, CONFIG["vocab_size"])
        found[f"prefill {length}"] = _in_turn(engines, lambda engine, it=prompts: engine.prefill(it), rounds)
    for batch in BATCHES:
        prompts = random_prompts(batch, DECODE_CONTEXT, CONFIG["vocab_size"])
        for engine in engines.values():
            engine.prefill(prompts)
        tokens = [prompt[0] for prompt in prompts]
        found[f"decode {batch}"] = _in_turn(engines, lambda engine, it=tokens: engine.decode(it), 3 * rounds)
    return found


def _in_turn(engines: dict[str, HeadraceEngine], run: Any, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            began = time.process_time()
            run(engine)
            if number:
                times[name].append(time.process_time() - began)
    return {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()}


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("headrace_core").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path)
    parser.add_argument("fp8", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", choices=[held.value for held in HELD])
    options = parser.parse_args()
    if options.load:
        _log.info(json.dumps(_load(options.fp8, WeightsDtype(options.load))))
        return
    folder = write_fp8(options.plain, options.fp8)
    _log.info(json.dumps({"load": bench_load(folder, options.rounds)}, indent=1))
    _log.info(json.dumps({"steps": bench_steps(folder, options.rounds)}, indent=1))


if __name__ == "__main__":
    _main()
