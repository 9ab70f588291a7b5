"""`make gpu-bench`: the engine on a GPU: its decode step, its tokens beside transformers', a cluster's latencies.

    python -m tests.perf.gpu_engine [--part step|tokens|cluster]... [--layers N] [--folder DIR] [--json PATH]
    python -m tests.perf.gpu_engine --device cpu --shape tiny
    python -m tests.perf.gpu_engine --floors

step: a V2-Lite-shaped network of random weights, never on a disk, captured as a decode worker captures it: ms of a
replay beside its floor at measured ceilings, launches, host time. tokens: greedy tokens of small checkpoints in float32
beside transformers on the same device. cluster: a random checkpoint written on the spot (31 GB), served by a router, a
prefill and a decode process on that GPU.

Results are merged into build/bench/kernels-gpu.json under "engine", those of each batch, checkpoint or load as soon as
they are known; a full run on a GPU also writes its tables to docs/kernels.md. Without a GPU it refuses; `--device cpu
--shape tiny` tries the command itself, with kernels in Triton's interpreter: none of its times means anything.
`--floors` needs no GPU: it writes the tables without times.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from headrace_kernels import use_backend
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from tests.perf import report_file
from tests.perf.gpu_engine.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[3]
GPU_REPORT = ROOT / "build" / "bench" / "kernels-gpu.json"
SMOKE_REPORT = ROOT / "build" / "bench" / "gpu-engine-smoke.json"
DOCS = ROOT / "docs" / "kernels.md"
MARKER = "engine-gpu"
PARTS = ("step", "tokens", "cluster")
_ROUNDS = {"cuda": 50, "cpu": 2}

console = Console(soft_wrap=True)

Report = Callable[[str], None]
OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Listeners:
    """What a part tells: what it does, bytes of weights done and of all, and figures as soon as they are known."""

    say: Report
    on_bytes: OnBytes
    keep: Callable[[dict[str, Any]], None]


def main(argv: list[str] | None = None) -> int:
    """Measure what the options name; return 0, 1 if a part failed or tokens differ, 2 if nothing could be tried."""
    options = _options(argv)
    if options.floors:
        _write_docs({}, SHAPES["v2-lite"])
        console.print(f"Floors written to {DOCS.relative_to(ROOT)}; nothing was measured.")
        return 0
    refusal = why_not(options.device, options.shape, has_gpu=torch.cuda.is_available())
    if refusal:
        console.print(refusal, style="red")
        return 2
    if options.device == "cpu":
        # Read by triton when the first kernel is defined, which nothing imported so far does.
        os.environ["TRITON_INTERPRET"] = "1"
    shape = SHAPES[options.shape]
    shape = shape.with_layers(options.layers) if options.layers else shape
    is_full = options.device == "cuda" and options.shape == "v2-lite" and not options.layers
    path = options.json or (GPU_REPORT if is_full else SMOKE_REPORT)
    found: dict[str, Any] = {}

    def keep(name: str, figures: dict[str, Any]) -> None:
        # At once: whoever ends the command later has what is known now.
        found[name] = {**_heading(options.device), "shape": shape.name, **figures}
        report_file.merge(path, {"engine": {**report_file.read(path).get("engine", {}), **found}})

    for name in (part for part in PARTS if part in (options.part or PARTS)):
        _run_part(name, shape, options, partial(keep, name))
    engine = report_file.read(path)["engine"]
    if is_full and not options.json:
        _write_docs(engine, shape)
    console.print(_tables(engine, shape), markup=False)
    console.print(f"Written to {path}.")
    return 1 if any(is_failure(part) for part in found.values()) else 0


def why_not(device: str, shape: str, *, has_gpu: bool) -> str:
    """Return why nothing can be measured; empty if it can."""
    if device == "cuda" and not has_gpu:
        return (
            f"torch {torch.__version__} sees no GPU, so nothing was measured and nothing written. Run this on a "
            "machine with a CUDA or ROCm GPU and a torch built for it; `--device cpu --shape tiny` tries the command "
            "without."
        )
    if device == "cpu" and shape != "tiny":
        return "--device cpu runs kernels in Triton's interpreter, which only --shape tiny is small enough for."
    return ""


def is_failure(part: dict[str, Any]) -> bool:
    """Say whether a part failed: an error, kernels that a worker would not serve with, or tokens that differ."""
    if "error" in part or isinstance(part.get("kernels_check"), str):
        return True
    return any(
        isinstance(row["kernels_check"], str) or min(row["equal"], row["equal_captured"]) < row["num_tokens"]
        for row in part.get("checkpoints", {}).values()
    )


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --shape tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="v2-lite", help="network, batches and loads")
    parser.add_argument("--layers", type=int, default=0, help="a network of so many; docs/kernels.md stays")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written, then deleted")
    parser.add_argument("--json", type=Path, default=None, help="report to merge results into; docs/kernels.md stays")
    parser.add_argument("--floors", action="store_true", help="no measurement: write the floors, on any machine")
    return parser.parse_args(argv)


def _run_part(name: str, shape: Shape, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Run a part in a folder that goes away; one that fails does not cost the others' figures, nor its own so far."""
    so_far: dict[str, Any] = {}

    def keep_so_far(figures: dict[str, Any]) -> None:
        so_far.update(figures)
        keep({**so_far, "unfinished": True})

    run = {"step": _step, "tokens": _tokens, "cluster": _cluster}[name]
    with (
        tempfile.TemporaryDirectory(prefix="headrace-", dir=options.folder) as folder,
        _progress() as (say, on_bytes),
    ):
        try:
            figures = run(shape, Path(folder), options.device, Listeners(say, on_bytes, keep_so_far))
        except Exception as error:  # noqa: BLE001 - see the docstring; the whole of it is printed
            console.print_exception()
            gist = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            figures = {**so_far, "error": gist}
    keep(figures)
    # The next part, and the cluster's own processes, need the memory that this one took.
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


def _step(shape: Shape, folder: Path, device: str, listeners: Listeners) -> dict[str, Any]:
    # These import kernels: not before the interpreter is asked for.
    from tests.perf.gpu_engine.step import measure_steps
    from tests.perf.gpu_engine.weights import random_model
    from tests.perf.kernels import ceilings as ceilings_of_gpu

    ceilings, say = ceilings_of_gpu.H200_ASSUMED, listeners.say
    if device == "cuda":
        say("measuring the GPU's ceilings")
        ceilings = ceilings_of_gpu.measure()
        torch.cuda.empty_cache()
    with _kernels_on(device):
        say("drawing random weights")
        model = random_model(shape.model_config(folder), device=device, on_bytes=listeners.on_bytes)
        listeners.keep({"ceilings": asdict(ceilings)})
        found = measure_steps(model, shape, ceilings, num_rounds=_ROUNDS[device], report=say, keep=listeners.keep)
    return {"ceilings": asdict(ceilings), **found}


def _tokens(shape: Shape, folder: Path, device: str, listeners: Listeners) -> dict[str, Any]:
    from tests.perf.gpu_engine.tokens import compare_tokens

    with _kernels_on(device):
        found = compare_tokens(
            folder,
            shape.greedy_checkpoints,
            device=device,
            num_tokens=shape.num_greedy_tokens,
            report=listeners.say,
            keep=listeners.keep,
        )
    return {"checkpoints": found}


def _cluster(shape: Shape, folder: Path, device: str, listeners: Listeners) -> dict[str, Any]:
    from tests.perf.gpu_engine.cluster import measure_cluster

    return measure_cluster(
        shape, folder, device=device, on_bytes=listeners.on_bytes, report=listeners.say, keep=listeners.keep
    )


def _kernels_on(device: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if device == "cuda" else use_backend("triton")


@contextlib.contextmanager
def _progress() -> Generator[tuple[Report, OnBytes]]:
    """Yield what shows a line of what is being done, and what shows a bar of bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None, visible=False)

        def show(done: int, total: int) -> None:
            progress.update(bar, description="weights", completed=done, total=total, visible=done < total)

        yield console.print, show


def _heading(device: str) -> dict[str, str]:
    from tests.perf.kernels.harness import versions

    name = torch.cuda.get_device_name() if device == "cuda" else "none: interpreted on a CPU, times mean nothing"
    return {"GPU": name, "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")} | versions()


def _tables(engine: dict[str, Any], shape: Shape) -> str:
    from tests.perf.gpu_engine.step import unmeasured_steps
    from tests.perf.gpu_engine.table import tables
    from tests.perf.kernels.ceilings import H200_ASSUMED

    return tables(engine, unmeasured_steps(shape, H200_ASSUMED))


def _write_docs(engine: dict[str, Any], shape: Shape) -> None:
    from headrace_kernels.aot.report import put_between

    DOCS.write_text(put_between(DOCS.read_text(), MARKER, _tables(engine, shape)))


if __name__ == "__main__":
    sys.exit(main())
