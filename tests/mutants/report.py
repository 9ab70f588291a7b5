"""The report of `make mutants`, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.mutants.outcome import Mutant
from tests.mutants.survivors import Known, Score

LEAST_SHARE = 0.85
"""Of the mutants that change behaviour, in every group."""


def summary(score: Score) -> str:
    """Return a line on a group."""
    return (
        f"{score.group:11} {score.share:6.1%}  {score.num_killed + score.num_timeouts} of {score.num_counted} killed "
        f"({score.num_timeouts} by time), {score.num_equivalent} equivalent, {score.num_wording} of wording  "
        f"{score.run.seconds} s"
    )


def faults(score: Score) -> list[str]:
    """Return what is to be done about a group, a line each."""
    found: list[str] = []
    if score.share < LEAST_SHARE:
        found.append(f"{score.group}: fewer than {LEAST_SHARE:.0%} killed; test what the report lists")
    if num_unexplained := sum(known is None for _, known in score.survivors):
        found.append(f"{score.group}: {num_unexplained} survived without a reason; test it, or say why it may")
    if score.unused:
        found.append(f"{score.group}: survivors.toml names {len(score.unused)} that did not survive; delete them")
    return found


def write(folder: Path, scores: list[Score]) -> None:
    """Write report.json and report.txt into `folder`."""
    (folder / "report.json").write_text(json.dumps(_values(scores), indent=1) + "\n")
    (folder / "report.txt").write_text("\n".join(_lines(scores)) + "\n")


def _values(scores: list[Score]) -> dict[str, Any]:
    return {
        "least_share": LEAST_SHARE,
        "groups": {
            score.group: {
                **asdict(score.run),
                "share": round(score.share, 4),
                "killed": score.num_killed,
                "timeouts": score.num_timeouts,
                "survived": len(score.survivors),
                "equivalent": score.num_equivalent,
                "wording": score.num_wording,
                "survivors": [_entry(mutant, known) for mutant, known in score.survivors],
                "timed_out": [_entry(mutant, None) for mutant in score.timeouts],
            }
            for score in scores
        },
    }


def _entry(mutant: Mutant, known: Known | None) -> dict[str, Any]:
    return {
        "function": mutant.function,
        "before": mutant.before,
        "after": mutant.after,
        "verdict": mutant.verdict.value,
        "reason": known.reason if known else None,
    }


def _lines(scores: list[Score]) -> list[str]:
    lines = [summary(score) for score in scores]
    for score in scores:
        for mutant, known in score.survivors:
            lines += ["", f"[{score.group}] {mutant.verdict.value}: {mutant.function}", *_diff(mutant)]
            lines.append(f"    reason: {known.reason}" if known else "    no reason given in survivors.toml")
        for mutant in score.timeouts:
            lines += ["", f"[{score.group}] killed by time: {mutant.function}", *_diff(mutant)]
        for entry in score.unused:
            lines += ["", f"[{score.group}] survivors.toml names what did not survive: {entry.function}"]
            lines += [f"  - {entry.before}", f"  + {entry.after}"]
    return lines


def _diff(mutant: Mutant) -> list[str]:
    removed = [f"  - {line}" for line in mutant.before.splitlines()]
    return removed + [f"  + {line}" for line in mutant.after.splitlines()]
