"""From compiled launches to a verdict, the JSON report and the table. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace_kernels.aot.resources import Resources
from headrace_kernels.gpu.launch import Target

TARGET_NAMES: dict[Target, str] = {"cuda": "cuda:90", "hip": "hip:gfx942"}
OK_FIELDS: dict[Target, str] = {"cuda": "cuda90_ok", "hip": "gfx942_ok"}


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled launch: where it came from, what it takes, what is wrong with it.

    `kernel` is "module.function". `nth` counts launches of one kernel within a case, from 0: rows of both targets with
    the same family, case, kernel and `nth` belong together. `key` is equal for equal machine code.
    """

    family: str
    case: str
    kernel: str
    nth: int
    target: Target
    tiles: str
    key: str
    resources: Resources | None
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    from_cache: bool = False
    needs_matrix_units: bool = False


def without_matrix_units(rows: Sequence[Row]) -> list[str]:
    """Return a message for each case that must multiply on matrix units and, on a target, has no launch that does."""
    must: set[tuple[str, str, Target]] = {
        (r.family, r.case, r.target) for r in rows if r.needs_matrix_units and r.resources is not None
    }
    does = {(r.family, r.case, r.target) for r in rows if r.resources is not None and r.resources.matrix_units}
    return [
        f"{family}, case '{case}', {TARGET_NAMES[target]}: no launch uses matrix instructions: check that tl.dot's "
        "tiles are at least 16 in every dimension and its operands of a type the target multiplies"
        for family, case, target in sorted(must - does)
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a message for everything that is wrong; nothing if all is well."""
    of_launches = [
        f"{row.family}, case '{row.case}', {TARGET_NAMES[row.target]}, kernel {row.kernel}: {problem} ({row.tiles})"
        for row in rows
        for problem in row.problems
    ]
    return of_launches + without_matrix_units(rows)


def report(rows: Sequence[Row], versions: dict[str, str], seconds: float) -> dict[str, Any]:
    """Return what build/bench/kernels-aot.json holds.

    `kernels` counts the kernels; `cuda90_kernels` and `gfx942_kernels` those that any case launches on that target;
    `cuda90_ok` and `gfx942_ok` those of the latter that have no problem in any launch. `spills` sums the bytes that a
    thread spills over all launches, `serialised` counts the launches whose wgmma instructions ptxas serialises;
    `uses_matrix_units` says whether every case that must does, on both targets.
    """
    kernels = {row.kernel for row in rows}
    found = failures(rows)

    fields: dict[str, int] = {}
    for target, ok_field in OK_FIELDS.items():
        launched = {row.kernel for row in rows if row.target == target}
        bad = {row.kernel for row in rows if row.target == target and row.problems}
        fields[ok_field] = len(launched - bad)
        fields[ok_field.replace("_ok", "_kernels")] = len(launched)
    compiled = {row.key: row for row in rows}.values()
    return {
        "kernels": len(kernels),
        **fields,
        "spills": sum(row.resources.spilled_bytes for row in compiled if row.resources is not None),
        "serialised": sum(bool(row.resources.serialised) for row in compiled if row.resources is not None),
        "uses_matrix_units": not without_matrix_units(rows),
        "matrix_kernels": {
            name: len(
                {(r.family, r.kernel) for r in rows if r.target == t and r.resources and r.resources.matrix_units}
            )
            for t, name in TARGET_NAMES.items()
        },
        "cases": len({(row.family, row.case) for row in rows}),
        "compiled": len(compiled),
        "from_cache": sum(row.from_cache for row in compiled),
        "compile_cpu_s": round(sum(row.seconds for row in compiled), 1),
        "wall_s": round(seconds, 1),
        "versions": versions,
        "failures": found,
        "launches": [asdict(row) for row in rows],
    }


def rows_of(report: dict[str, Any]) -> list[Row]:
    """Return the rows that a report was made of."""
    return [_row(**launch) for launch in report["launches"]]


def _row(resources: dict[str, Any] | None, problems: Sequence[str], **fields: Any) -> Row:
    return Row(resources=None if resources is None else Resources(**resources), problems=tuple(problems), **fields)


def table(rows: Sequence[Row], versions: dict[str, str], also: dict[str, Any] | None = None) -> str:
    """Return the table for docs/kernels.md: a line a launch, both targets in it; equal machine code only once.

    Where a figure is another one in `also`, another Triton's report, that follows after a slash.
    """
    pairs: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault(_place(row), {})[row.target] = row
    others = {(*_place(row), row.target): row for row in rows_of(also)} if also else {}
    by = versions["triton"] + (f" and, after a slash where it differs, {also['versions']['triton']}" if also else "")
    lines = [
        f"Compiled with Triton {by}. Registers are a thread's (a lane's, of which accumulators), "
        "shared memory a program's.",
        "",
        "| Case | Kernel | sm_90: registers | shared KiB | matrix | spills "
        "| gfx942: registers | LDS KiB | matrix | spills |",
        "|---|---|--:|--:|---|--:|--:|--:|---|--:|",
    ]
    shown: set[str] = set()
    for place, pair in pairs.items():
        keys = {row.key for row in pair.values()}
        if keys <= shown:
            continue
        shown |= keys
        family, case, kernel, _ = place
        name = case if case.startswith(family) else f"{family}: {case}"
        cells: list[str] = []
        for target in TARGET_NAMES:
            here = _cells(pair.get(target))
            there = _cells(others.get((*place, target))) if also else here
            cells += [a if a == b else f"{a} / {b}" for a, b in zip(here, there, strict=True)]
        lines.append(f"| {name} | `{kernel.rpartition('.')[2]}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(row: Row) -> tuple[str, str, str, int]:
    return row.family, row.case, row.kernel, row.nth


def _cells(row: Row | None) -> tuple[str, str, str, str]:
    if row is None:
        return "–", "–", "–", "–"
    if row.resources is None:
        return "does not compile", "–", "–", "–"
    r = row.resources
    registers = f"{r.registers} ({r.accumulators})" if row.target == "hip" else f"{r.registers}"
    matrix = f"{r.matrix_units or 'none'}{', serialised' if r.serialised else ''}"
    return registers, f"{r.shared_bytes / 1024:.1f}", matrix, f"{r.spilled_bytes}"


def put_between(text: str, name: str, content: str) -> str:
    """Return `text` with what is between `<!-- name: begin -->` and `<!-- name: end -->` replaced by `content`.

    ValueError if the two markers are not there, once and in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the markers {begin} and {end} must be in the text, once and in this order")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"
