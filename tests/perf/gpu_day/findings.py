"""What a day's files say, in a few lines; also of parts that were cut off."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tests.perf import report_file
from tests.perf.kernels.parity import outcomes

_MOST = 12


def findings(out: Path) -> Generator[str]:
    """Yield lines about parity, compilation, the decode step, kernels, tokens and tuning, of those that have begun."""
    yield from _parity(out / "parity.jsonl")
    yield from _compiled(_lines(out / "compile.jsonl"))
    engine = report_file.read(out / "engine.json").get("engine", {})
    yield from _step(engine.get("step", {}))
    yield from _kernels(_lines(out / "kernels.jsonl"))
    yield from _tokens(engine.get("tokens", {}))
    yield from _tuned(report_file.read(out / "tuned.json"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parity(path: Path) -> Generator[str]:
    tests = outcomes(path.read_text()) if path.exists() else {}
    if not tests:
        return
    counts = Counter(line["outcome"] for line in tests.values())
    yield "parity: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    failed = {test: line.get("why", "") for test, line in tests.items() if line["outcome"] == "failed"}
    hanging = [test for test, line in tests.items() if line["outcome"] == "began"]
    yield from _first([f"  failed: {test}: {_gist(why)}" for test, why in failed.items()])
    yield from _first([f"  began and did not end: {test}" for test in hanging])
    wrong = sorted({Path(test.partition("::")[0]).stem.removeprefix("test_") for test in failed})
    if wrong:
        yield f"  speeds below of what is wrong mean nothing: {', '.join(wrong)}"


def _gist(why: str) -> str:
    return " ".join(why.split())[:160]


def _compiled(lines: list[dict[str, Any]]) -> Generator[str]:
    if not lines:
        return
    bad = [f"  {line['launch']}: {_gist('; '.join(line['problems']))}" for line in lines if line["problems"]]
    yield f"compile: {len(lines) - len(bad)} launches, {len(bad)} more with a problem"
    yield from _first(bad)


def _step(part: dict[str, Any]) -> Generator[str]:
    if "error" in part:
        yield f"step: failed: {part['error']}"
    for batch, row in part.get("batches", {}).items():
        yield f"step: batch {batch}: {row['replay_ms']:.3f} ms, {row['fraction']:.0%} of its floor"


def _kernels(lines: list[dict[str, Any]]) -> Generator[str]:
    rows = [line for line in lines if "family" in line]
    for family in dict.fromkeys(row["family"] for row in rows):
        shares = [row["fraction"] for row in rows if row["family"] == family and row["fraction"] is not None]
        among = f", {min(shares):.0%} to {max(shares):.0%} of their floors" if shares else ""
        yield f"kernels: {family}: {len(shares)} cases measured{among}"
    yield from _first([f"  {row['family']} {row['shape']}: {_gist(row['error'])}" for row in rows if row["error"]])


def _tokens(part: dict[str, Any]) -> Generator[str]:
    if "error" in part:
        yield f"tokens: failed: {part['error']}"
    for name, row in part.get("checkpoints", {}).items():
        equal = f"{row['equal']} plain and {row['equal_captured']} captured of {row['num_tokens']}"
        yield f"tokens: {name}: {equal} equal transformers'"


def _tuned(content: dict[str, Any]) -> Generator[str]:
    for family, entries in content.get("families", {}).items():
        for key, entry in entries.items():
            yield f"tuned: {family} {key}: {entry['us']:.1f} µs with {entry['config']}"


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"  and {len(lines) - _MOST} more"]
