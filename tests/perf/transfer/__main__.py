"""`make bench-transfer`: what moving pages costs, beside what the same bytes cost without us.

    python -m tests.perf.transfer [--rounds N] [--json PATH]

Two processes: one holds 256 MiB of pages, this one takes them. Contenders take turns in every round, so that what the
machine does besides meets all alike; figures are medians over rounds, CPU seconds are user and system time of both
processes, ratios are medians of the ratios within rounds.

Ours are verified, and moved as a hand-off moves them: runs of at most 16 MiB, four at a time. Their raw peers: gRPC's
raw bytes in frames of 2 MiB, copied out of the holder's pages and into the taker's; the same frames made beforehand and
dropped on arrival; a TCP socket into the pages; a copy of the same pages in the same pieces inside one process, with
and without summing each while it is hot; NIXL's own calls, where it is installed, in a second pass without the others,
as its holder is never quite idle. All have the workers' allocator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from headrace_core.process import keep_freed_memory
from headrace_core.transfer.transports import usable

from tests.perf import report_file
from tests.perf.machine import machine
from tests.perf.transfer.contenders import Contenders
from tests.perf.transfer.pools import SIZES, Size

RAW_PEERS = ("memcpy", "memcpy_checked", "raw_socket", "raw_grpc_dropped", "raw_grpc")
REPORT = Path("build/bench/transfer.json")
Sample = dict[str, float]
Samples = dict[str, dict[str, list[Sample]]]
"""By contender, then by size: one for each round."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=REPORT)
    options = parser.parse_args()
    keep_freed_memory()
    ours = usable("auto")
    served, samples = _pass([name for name in ours if name != "nixl"], options.rounds, RAW_PEERS)
    if "nixl" in ours:
        samples |= _pass(["nixl"], options.rounds, ("raw_nixl",))[1]
    report = {
        **machine(),
        "commands": {"taker": sys.orig_argv, "holder": served["argv"]},
        "bytes": {size.name: size.num_bytes for size in SIZES},
        **keys(samples),
        "medians": {name: {size: _medians(rows) for size, rows in by.items()} for name, by in samples.items()},
        "samples": samples,
    }
    report_file.merge(options.json, report)
    _print(report)


def _pass(names: Sequence[str], num_rounds: int, peers: Sequence[str]) -> tuple[dict[str, Any], Samples]:
    """Return what the holder's process says of itself, and the samples of these transports and their peers."""
    serving = subprocess.Popen(
        [sys.executable, "-m", "tests.perf.transfer.serve", *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serving.stdin is not None
    assert serving.stdout is not None
    try:
        served = json.loads(serving.stdout.readline())
        return served, uvloop.run(_measure(served, serving.pid, num_rounds, [*peers, *names]))
    finally:
        serving.stdin.close()
        serving.wait(30)


async def _measure(served: dict[str, Any], holder_pid: int, num_rounds: int, names: Sequence[str]) -> Samples:
    contenders = Contenders(served, SIZES)
    await contenders.open()
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for index in range(-1, num_rounds):
        for name in names if index % 2 else reversed(names):
            for size in SIZES:
                sample = await _sample(contenders, name, size, holder_pid)
                if index >= 0:  # the first round is for what is done once
                    samples[name][size.name].append(sample)
    await contenders.close()
    return {name: dict(by) for name, by in samples.items()}


async def _sample(contenders: Contenders, name: str, size: Size, holder_pid: int) -> Sample:
    move = contenders.moves[name]
    cpu_s, walls_s = _cpu_s(holder_pid), list[float]()
    for _ in range(size.num_repeats):
        begun = time.perf_counter()
        await move(size)
        walls_s.append(time.perf_counter() - begun)
    cpu_s = _cpu_s(holder_pid) - cpu_s
    wall_s, gb = statistics.median(walls_s), size.num_bytes / 1e9
    return {
        "latency_us": wall_s * 1e6,
        "gb_per_s": gb / wall_s,
        "cpu_s_per_gb": cpu_s / (gb * size.num_repeats),
    }


def _cpu_s(holder_pid: int) -> float:
    """Return user and system seconds of both processes; the holder's clock is named as clock_getcpuclockid does."""
    return time.process_time() + time.clock_gettime((~holder_pid << 3) | 2)


def keys(samples: Samples) -> dict[str, float | None]:
    """Return what is asked of a release, from the samples of 256 MiB; None: its contender did not run."""
    return {
        "grpc_cpu_s_per_gb": _median(samples, "grpc", "cpu_s_per_gb"),
        "raw_grpc_cpu_s_per_gb": _median(samples, "raw_grpc", "cpu_s_per_gb"),
        "grpc_vs_raw": _ratio(samples, "grpc", "raw_grpc", "cpu_s_per_gb"),
        "grpc_vs_raw_dropped": _ratio(samples, "grpc", "raw_grpc_dropped", "cpu_s_per_gb"),
        "shm_cpu_s_per_gb": _median(samples, "shm", "cpu_s_per_gb"),
        "shm_vs_memcpy": _ratio(samples, "shm", "memcpy_checked", "gb_per_s"),
        "shm_vs_memcpy_cpu": _ratio(samples, "memcpy_checked", "shm", "cpu_s_per_gb"),
        "nixl_vs_raw": _ratio(samples, "nixl", "raw_nixl", "gb_per_s"),
    }


def _median(samples: Samples, name: str, figure: str) -> float | None:
    rows = samples.get(name, {}).get("256MiB")
    return round(statistics.median(row[figure] for row in rows), 4) if rows else None


def _ratio(samples: Samples, name: str, peer: str, figure: str) -> float | None:
    rows, peers = (samples.get(each, {}).get("256MiB") for each in (name, peer))
    if not rows or not peers:
        return None
    return round(statistics.median(a[figure] / b[figure] for a, b in zip(rows, peers, strict=True)), 4)


def _medians(rows: Sequence[Sample]) -> Sample:
    return {figure: round(statistics.median(row[figure] for row in rows), 4) for figure in rows[0]}


def _print(report: dict[str, Any]) -> None:
    out = [f"{report['cpu']}, {report['cores']} cores, {report['cpu_flags']}; load {report['load_average']:.1f}"]
    out.append(f"{'':16}" + "".join(f"{size.name:>34}" for size in SIZES))
    out.append(f"{'':16}" + f"{'us':>12}{'GB/s':>10}{'CPU s/GB':>12}" * len(SIZES))
    for name, by in report["medians"].items():
        cells = [by[size.name] for size in SIZES]
        row = "".join(f"{it['latency_us']:12.0f}{it['gb_per_s']:10.2f}{it['cpu_s_per_gb']:12.3f}" for it in cells)
        out.append(f"{name:16}{row}")
    out += [f"{name}: {report[name]}" for name in keys({})]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
