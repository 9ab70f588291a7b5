"""What `--predict-local` is worth, on real workers of a pace and simulated: short prompts between long ones.

    python -m tests.perf.router.local_prefill --rounds 2

One prefill and one decode worker, three of four prompts short, the fourth long, evenly. With the prediction the decode
worker computes those itself that would come later from the prefill worker (`placement/local_prefill.py`). Router, wire,
workers and hand-offs are the product's; only the network takes no core (`paced_worker`). Writes
build/bench/local-prefill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from headrace_client.bench.goodput import parse_goodput
from headrace_core.request_trace import Workload
from headrace_planner.sim_config import Wire

from tests.perf.machine import machine
from tests.perf.router.paced import Fleet, ask, seen, sessions_of, simulated

_REPORT = Path("build/bench/local-prefill.json")
_GOODPUT = parse_goodput("ttft:1000,tpot:100")
_SHORT, _LONG = 24, 2000
_WIRE = Wire(bytes_per_token=32, bandwidth=1e9, latency_s=5e-3, rpc_s=1e-3, admit_s=1e-3)


def main() -> None:
    """Measure and simulate with and without, print a line of each, write all."""
    parser = argparse.ArgumentParser(description="Measure what predicting local prompts is worth.")
    parser.add_argument("--num-requests", type=int, default=240)
    parser.add_argument("--rate", type=float, default=6.25, help="requests a second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=_REPORT)
    options = parser.parse_args()
    num = np.arange(options.num_requests)
    prompts = np.where(num % 4 == 0, _LONG, _SHORT)
    workload = Workload(num / options.rate, prompts, np.full(len(num), 20), block_tokens=64)
    lines: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for predicts in (False, True):
            fleet = replace(
                Fleet(1, 1, step_tokens=2048, slots=64), router_options={"predict-local": True} if predicts else {}
            )
            records = ask(fleet, sessions_of(workload))
            line: dict[str, Any] = {"predict_local": predicts, "load_average": os.getloadavg()[0]}
            for name, length in (("short", _SHORT), ("long", _LONG)):
                ttft = [1e3 * each.ttft_s for each in records if each.is_ok and each.num_prompt == length]
                line[f"ttft_{name}_mean"], line[f"ttft_{name}_p99"] = (
                    float(np.mean(ttft)),
                    float(np.percentile(ttft, 99)),
                )
            measured = seen(records, _GOODPUT)
            lines.append({**line, "measured": measured, "simulated": simulated(fleet, workload, _GOODPUT, _WIRE)})
            shown = {name: round(value, 1) for name, value in line.items() if name.startswith("ttft")}
            gaps = {name: round(measured[name], 1) for name in ("itl_p50", "itl_p99")}
            sys.stdout.write(f"{'predicted' if predicts else 'never':<10} {shown} {gaps}\n")
            sys.stdout.flush()
    report = {**machine(), "command": sys.argv, "lines": lines}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
