"""Plays every cell of the matrix and writes build/matrix.json: `make matrix`, or `make matrix TRANSPORT=grpc`.

Without TRANSPORT all transports of the table are played. Exits with 1 if a cell did not end as it must.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.matrix.cell import Result
from tests.matrix.run import play_all, transports, wanted_tokens
from tests.matrix.table import cells
from tests.perf.machine import machine

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run and exit with 1 on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--transport", action="extend", nargs="+", default=[], help=f"some of {', '.join(transports())}; default: all"
    )
    parser.add_argument("--event", action="extend", nargs="+", default=[], help="these events alone; default: all")
    parser.add_argument("--phase", action="extend", nargs="+", default=[], help="these phases alone; default: all")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "matrix.json")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    chosen = [
        cell
        for transport in arguments.transport or transports()
        for cell in cells(transport)
        if cell.event.name in (arguments.event or [cell.event.name]) and cell.phase in (arguments.phase or [cell.phase])
    ]

    def show(result: Result) -> None:
        state = f"[red]{result.problems[0]}[/red]" if result.problems else result.end
        console.print(f"{result.event} while {result.phase} over {result.transport}: {state} ({result.seconds:.1f} s)")
        for problem in result.problems[1:]:
            console.print(problem, markup=False, highlight=False)

    began_s = time.monotonic()

    async def run() -> list[Result]:
        return await play_all(chosen, await wanted_tokens(), on_result=show)

    results = asyncio.run(run())
    failed = sum(bool(result.problems) for result in results)
    report = {"machine": machine(), "command": sys.argv, "cells": [result.as_dict() for result in results]}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{len(results)} cells in {time.monotonic() - began_s:.0f} s, {failed} failed; {arguments.json}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
