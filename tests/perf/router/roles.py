"""Roles that follow the load beside fixed ratios, on real workers of a pace and simulated: a mix that changes.

    python -m tests.perf.router.roles --rounds 2

Four workers each time: prefill and decode ones, two to two or three to one (one to three computes a third of this
trace's prompts), then some prefill ones beside workers of role `both`, and those alone. The trace is prompts with short
answers, short prompts with long answers, and both again, by Poisson's arrivals. Router, wire, workers, pages and
hand-offs are the product's; what takes no core is the network (`paced_worker`). Writes build/bench/roles.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from headrace_client.bench.goodput import parse_goodput
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import Wire
from headrace_planner.workload import Phase, changing

from tests.perf.machine import machine
from tests.perf.router.paced import Fleet, ask, seen, sessions_of, simulated

_REPORT = Path("build/bench/roles.json")
FLEETS = (
    Fleet(2, 2),
    Fleet(3, 1),
    Fleet(1, num_both=3),
    Fleet(2, num_both=2),
    Fleet(0, num_both=4),
)
_WIRE = Wire(bytes_per_token=32, bandwidth=1e9, rpc_s=1e-3, admit_s=1e-3)
"""Of the paced workers' pages; times of calls on loopback, about."""


def trace(seconds: float, prompts_per_s: float, answers_per_s: float, seed: int) -> Workload:
    """Return the mix, twice: prompts, of which a prefill worker does 4.4 a second, then answers, a decode worker 3."""
    prompts, answers = Phase(seconds, prompts_per_s, 1000, 8), Phase(seconds, answers_per_s, 64, 200)
    return changing((prompts, answers, prompts, answers), seed=seed)


def main() -> None:
    """Measure and simulate each fleet, print a line of each, write all."""
    parser = argparse.ArgumentParser(description="Measure roles that follow the load beside fixed ratios.")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of four phases")
    parser.add_argument("--prompts-per-s", type=float, default=12.0)
    parser.add_argument("--answers-per-s", type=float, default=7.0)
    parser.add_argument("--rounds", type=int, default=1, help="each with arrivals of its own")
    parser.add_argument("--goodput", default="ttft:2000,tpot:60", help="objectives, milliseconds")
    parser.add_argument("--json", type=Path, default=_REPORT)
    options = parser.parse_args()
    goodput = parse_goodput(options.goodput)
    lines: list[Mapping[str, Any]] = []
    for round_number in range(options.rounds):
        workload = trace(options.seconds, options.prompts_per_s, options.answers_per_s, round_number)
        for fleet in FLEETS:
            measured = seen(ask(fleet, sessions_of(workload)), goodput)
            line = {"fleet": str(fleet), "round": round_number, "load_average": os.getloadavg()[0]}
            lines.append({**line, "measured": measured, "simulated": simulated(fleet, workload, goodput, _WIRE)})
            sys.stdout.write(_shown(lines[-1]))
            sys.stdout.flush()
            _write(options.json, options.goodput, lines)


def _shown(line: Mapping[str, Any]) -> str:
    text = f"{line['fleet']:<20}"
    for kind in ("measured", "simulated"):
        found = {name: round(value, 3 if name == "met" else 1) for name, value in line[kind].items()}
        cells = " ".join(f"{name} {found[name]}" for name in ("met", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"))
        text += f"  {kind}: {cells}"
    return f"{text}\n"


def _write(path: Path, objectives: str, lines: Sequence[Mapping[str, Any]]) -> None:
    means = {
        fleet: {
            kind: float(np.mean([line[kind]["met"] for line in lines if line["fleet"] == fleet]))
            for kind in ("measured", "simulated")
        }
        for fleet in dict.fromkeys(line["fleet"] for line in lines)
    }
    report = {**machine(), "command": sys.argv, "goodput": objectives, "met": means, "lines": lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
