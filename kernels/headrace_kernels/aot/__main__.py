"""`python -m headrace_kernels.aot`: compile every kernel for GPUs that need not be there, and judge the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headrace_kernels.aot.compile import Compiled, compile_all
from headrace_kernels.aot.launches import Job, cases, find_families, keyed_jobs, recorded, tile_text, versions
from headrace_kernels.aot.other_triton import report_under
from headrace_kernels.aot.report import OK_FIELDS, TARGET_NAMES, Row, put_between, report, table
from headrace_kernels.gpu.launch import Target

console = Console(soft_wrap=True)


def main() -> int:
    """Compile what the options name; return 0 if all is well, 1 if a kernel is not, 2 if nothing could be tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", help="only this family; may be given more than once")
    parser.add_argument("--target", choices=list(TARGET_NAMES.values()), help="only this target; default: both")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default: 2)")
    parser.add_argument("--also-triton", type=Path, metavar="FOLDER", help="compile with the Triton in there, too")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report there")
    parser.add_argument("--write-table", type=Path, metavar="PATH", help="rewrite the table in that Markdown file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        console.print("TRITON_INTERPRET=1 is set: Triton would interpret kernels, not compile them. Unset it.")
        return 2
    if options.write_table and (options.family or options.target):
        console.print("--write-table needs every family and target: leave out --family and --target.")
        return 2
    try:
        also = _also(options) if options.also_triton else None
        began_s = time.monotonic()
        rows, not_recorded = _compile(options.family, options.target, options.jobs)
    except ValueError as error:
        console.print(f"{error}", markup=False)
        return 2
    result = report(rows, versions(), time.monotonic() - began_s)
    result["failures"] = not_recorded + result["failures"]
    if also:
        result["also"] = also
        result["failures"] += [f"Triton {also['versions']['triton']}: {message}" for message in also["failures"]]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.write_table:
        text = put_between(options.write_table.read_text(), "kernels-aot", table(rows, versions(), also))
        options.write_table.write_text(text)
    _say(result, rows)
    return 1 if result["failures"] else 0


def _also(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report of the same command under the Triton of --also-triton; ValueError if that is this one."""
    arguments = [f"--jobs={options.jobs}", *(f"--family={family}" for family in options.family or [])]
    arguments += [f"--target={options.target}"] if options.target else []
    also = report_under(options.also_triton, arguments)
    if also["versions"]["triton"] == versions()["triton"]:
        raise ValueError(f"{options.also_triton} holds Triton {versions()['triton']}, which is the installed one")
    return also


def _compile(families: list[str] | None, target: str | None, num_processes: int) -> tuple[list[Row], list[str]]:
    """Record, compile each distinct launch once; returns a row for every launch, and the cases that do not record."""
    targets: list[Target] = [t for t, name in TARGET_NAMES.items() if target in (None, name)]
    keys, not_recorded = keyed_jobs(families or find_families(), targets)
    first_of_key = {key: job for job, key in reversed(keys.items())}
    columns = (TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(first_of_key))
        done = compile_all(list(first_of_key.values()), num_processes, lambda: progress.advance(bar))
    return [_row(job, key, done[first_of_key[key]]) for job, key in keys.items()], not_recorded


def _row(job: Job, key: str, compiled: Compiled) -> Row:
    launches = recorded(job.family, job.case, job.target)
    launch, case = launches[job.launch], cases(job.family)[job.case]
    return Row(
        family=job.family,
        case=case.name,
        kernel=f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.__name__}",
        nth=sum(earlier.kernel is launch.kernel for earlier in launches[: job.launch]),
        target=job.target,
        tiles=tile_text(launch),
        key=key,
        resources=compiled.resources,
        problems=compiled.problems,
        seconds=round(compiled.seconds, 2),
        from_cache=compiled.from_cache,
        needs_matrix_units=case.uses_matrix_units,
    )


def _say(result: dict[str, Any], rows: list[Row]) -> None:
    cached = f", {result['from_cache']} of them from Triton's cache" if result["from_cache"] else ""
    tried = {row.target for row in rows}
    well = " and ".join(
        f"{result[field]} of {result[field.replace('_ok', '_kernels')]} on {TARGET_NAMES[target]}"
        for target, field in OK_FIELDS.items()
        if target in tried
    )
    console.print(
        f"Triton {result['versions']['triton']}: {result['kernels']} kernels in {result['cases']} cases, "
        f"well are {well or 'none'}; {result['compiled']} distinct launches in {result['wall_s']} s{cached}."
    )
    compiled = {row.key: row for row in rows if not row.from_cache}.values()
    for row in sorted(compiled, key=lambda r: -r.seconds)[:3]:
        console.print(
            f"  slowest: {row.seconds:.1f} s {row.family}: {row.case}, {row.kernel}, {row.target}", markup=False
        )
    for message in result["failures"]:
        console.print(f"FAILED {message}", markup=False, style="red")


if __name__ == "__main__":
    sys.exit(main())
