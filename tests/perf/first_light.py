"""`make bench`: speed and memory on this machine's CPU, beside transformers on the same weights in the same run.

    python -m tests.perf.first_light [--quick]

Measures the demo model and a random DeepSeek-V3 checkpoint of 280M parameters: prefill, decode, peak memory; then the
hand-off's bytes per second between two worker processes and the router's CPU time per token. Prints tables and writes
build/bench/first-light.json. Machines are noisy: compare within one run, by the ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from headrace_client import Client
from headrace_client.cluster.cores import available_cores
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.request import SamplingParams
from headrace_router.testing import write_tokenizer
from rich.console import Console
from rich.table import Table

from tests.perf import checkpoint_280m
from tests.perf.machine import machine
from tests.perf.model_bench import bench_model
from tests.perf.router import cell, sides

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "demo" / "model"
LARGE_MODEL = ROOT / "build" / "checkpoint-280m"
REPORT = ROOT / "build" / "bench" / "first-light.json"

BATCHES = (1, 8, 16, 32)
PROMPT_LENGTHS = (512, 2048)
HANDOFF_TOKENS = 1984
HANDOFF_ROUNDS = 7


console = Console()


def main() -> None:
    """Measure everything, print it, write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="demo model only, batch 1 and 16, one prompt length")
    options = parser.parse_args()
    threads = available_cores()
    batches, lengths = ((1, 16), (512,)) if options.quick else (BATCHES, PROMPT_LENGTHS)
    models = {"demo": DEMO_MODEL} if options.quick else {"demo": DEMO_MODEL, "280M": large_model()}

    report: dict[str, Any] = {"machine": {**machine(), "threads": threads}, "models": {}}
    for name, directory in models.items():
        with console.status(f"{name}: prefill, decode and memory, beside transformers …"):
            found = bench_model(directory, threads=threads, batches=batches, prompt_lengths=lengths)
        report["models"][name] = found
        show_model(name, found)
    with console.status("hand-off between two processes …"):
        report["handoff"] = measure_handoff(list(models.values())[-1])
    show(report["handoff"], "Hand-off over gRPC, prefill process → decode process")
    with console.status("router: 32 streams …"), sides.ours(20.0) as (_, over_grpc):
        report["router"] = cell.run(over_grpc, cell.Cell("paced_32", 32, 64, 96, 20.0))
    show(report["router"], "Router")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1))
    console.print(f"Written to {REPORT.relative_to(ROOT)}.")


def large_model() -> Path:
    """Write the 280M checkpoint, with a byte tokenizer for the router, unless it is there."""
    with console.status("writing the 280M checkpoint …"):
        checkpoint_280m.write(LARGE_MODEL)
        return write_tokenizer(LARGE_MODEL)


def measure_handoff(directory: Path) -> dict[str, Any]:
    """Return the median rate at which a decode process takes the pages of long prompts from a prefill process.

    The time is the decode worker's own: from the first byte asked for to the last one verified.
    """
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    rates: list[float] = []
    with LocalCluster(directory) as cluster, Client(cluster.router_address) as client:
        for _ in range(HANDOFF_ROUNDS):
            prompt = [rng.randrange(3, min(vocab_size, 250)) for _ in range(HANDOFF_TOKENS)]
            params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0)
            timings = client.generate(prompt, params, include_timings=True).timings
            assert timings, "asked for"
            transfer_us = sum(phase.duration_us for phase in timings.phases if phase.name == "transfer")
            rates.append(timings.transfer_bytes / transfer_us)
    return {
        "prompt_tokens": HANDOFF_TOKENS,
        "pages": timings.num_transfer_pages,
        "mib": round(timings.transfer_bytes / 2**20, 1),
        "mb_per_s": round(statistics.median(rates), 1),
        "ms": round(timings.transfer_bytes / statistics.median(rates) / 1e3, 2),
        "rounds": HANDOFF_ROUNDS,
    }


def show_model(name: str, found: dict[str, Any]) -> None:
    """Print one model's figures as a table."""
    table = Table(title=f"{name} model, {found['threads']} threads", title_justify="left")
    for column in ("", "Headrace", "transformers", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for length, row in found["prefill"].items():
        table.add_row(
            f"prefill {length}, tokens/s",
            f"{row['headrace_tokens_per_s']:,.0f}",
            f"{row['transformers_tokens_per_s']:,.0f}",
            f"{row['ratio']:.2f}×",
        )
    for batch, row in found["decode"].items():
        table.add_row(
            f"decode batch {batch}, ms/step",
            f"{row['headrace_ms']:.2f}",
            f"{row['transformers_ms']:.2f}",
            f"{row['ratio']:.2f}×",
        )
    memory = found["memory"]
    table.add_row(
        f"peak memory, MiB (bound {memory['headrace_bound_mib']:,.0f})",
        f"{memory['headrace_peak_mib']:,.0f}",
        f"{memory['transformers_peak_mib']:,.0f}",
        f"{memory['transformers_peak_mib'] / memory['headrace_peak_mib']:.2f}×",
    )
    console.print(table)


def show(figures: dict[str, Any], title: str) -> None:
    """Print figures by name."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


if __name__ == "__main__":
    main()
