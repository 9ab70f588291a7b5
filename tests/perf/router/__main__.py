"""`make bench-router`: what the router costs, beside other projects' routers, in turns (build/bench/router.json).

    python -m tests.perf.router --rounds 3
    python -m tests.perf.router --sides headrace --cells paced_256 --old ../old-checkout

No model: workers that compute nothing, ours by our protocol, others' by theirs. Clients read streams over loopback.
What is printed is the least of the rounds, which other work on the machine changes least; every sample is in the file.

    paced_1, paced_32, paced_256    so many streams of 64 tokens, one each 20 ms: the figures that count
    full_256                        256 streams of 256 tokens as fast as everybody can: the most tokens a second
    short_16                        16 streams of 4 tokens, one each ms: what a request costs
    alone_1                         one after the other, 2 tokens each: what a router adds to the first token
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.perf.engine.peer import NoPeerError
from tests.perf.machine import machine
from tests.perf.router import sides
from tests.perf.router.cell import Cell, run
from tests.perf.router.sides import Side
from tests.perf.router.summary import summary, table

_REPORT = Path("build/bench/router.json")
CELLS = (
    Cell("paced_1", 1, 64, 8, 20.0),
    Cell("paced_32", 32, 64, 96, 20.0),
    Cell("paced_256", 256, 64, 768, 20.0),
    Cell("full_256", 256, 256, 256, 0.0),
    Cell("short_16", 16, 4, 1600, 1.0),
    Cell("alone_1", 1, 2, 200, 1.0),
)
OLD = "old"
"""Our router of another checkout, over HTTP; over gRPC `old-grpc`."""

Samples = dict[str, dict[str, list[dict[str, Any]]]]
"""By cell and side."""


def measure(cells: tuple[Cell, ...], wanted: list[str], options: argparse.Namespace) -> tuple[Samples, dict[str, str]]:
    """Return samples and why sides are missing, and print as it goes."""
    samples: Samples = {cell.name: defaultdict(list) for cell in cells}
    missing: dict[str, str] = {}
    for step_ms in dict.fromkeys(cell.step_ms for cell in cells):
        with contextlib.ExitStack() as stack:
            serving = _start(stack, wanted, step_ms, options, missing)
            for number in range(options.rounds):
                for cell in (each for each in cells if each.step_ms == step_ms):
                    # Whoever comes first finds the machine as the last one left it: begin with another each round.
                    for place in range(len(serving)):
                        side = serving[(place + number) % len(serving)]
                        found = run(side, cell) | {"load_average": os.getloadavg()[0]}
                        samples[cell.name][side.name].append(found)
                        _say(f"{cell.name:<10} {side.name:<14} {found['us_per_token']:8.1f} µs/token")
    return samples, missing


def _start(
    stack: contextlib.ExitStack, wanted: list[str], step_ms: float, options: argparse.Namespace, missing: dict[str, str]
) -> list[Side]:
    starts: dict[str, Callable[[], contextlib.AbstractContextManager[list[Side]]]] = {
        sides.OURS: lambda: sides.ours(step_ms, options=options.router_option),
        sides.VLLM: lambda: sides.peer(sides.VLLM, options.peers, step_ms),
        sides.SGLANG: lambda: sides.peer(sides.SGLANG, options.peers, step_ms),
        sides.DIRECT: lambda: sides.direct(step_ms),
    }
    if options.old is not None:
        starts[OLD] = lambda: sides.ours(step_ms, code=options.old, name=OLD)
    serving: list[Side] = []
    for name, start in starts.items():
        try:
            if any(each.startswith(name) for each in wanted):
                serving += [side for side in stack.enter_context(start()) if side.name in wanted]
        except NoPeerError as error:
            missing[name] = str(error)
            _say(f"{name}: not measured: {error}")
    return serving


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure what the router costs, beside others.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], help="default: all")
    parser.add_argument("--sides", nargs="+", choices=sides.NAMES, default=list(sides.NAMES))
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder with routers/bin")
    parser.add_argument("--old", type=Path, help="a checkout whose router takes turns with ours")
    parser.add_argument(
        "--router-option", nargs="*", default=[], help="for our router, as --router-option=--processes=2"
    )
    parser.add_argument("--json", type=Path, default=_REPORT)
    options = parser.parse_args()
    cells = tuple(cell for cell in CELLS if options.cells is None or cell.name in options.cells)
    wanted = list(options.sides)
    if options.old is not None:
        wanted += [name.replace(sides.OURS, OLD) for name in wanted if name.startswith(sides.OURS)]
    samples, missing = measure(cells, wanted, options)
    report = {**machine(), "command": sys.argv, "not_measured": missing, **summary(samples), "samples": samples}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    _say(table(samples))
    _say(json.dumps(summary(samples), indent=1))
    _say(f"Written to {options.json}.")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
