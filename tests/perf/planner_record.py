"""The run that docs/planner.md shows, as it is kept in the repository: planner_record.json, beside this file.

`make planner-report` writes it, and makes its report of what it wrote: times are rounded there. CI fits and predicts
with it again, so that a fit or a simulator that gets worse fails without anything being measured
(tests/unit/test_planner_record.py).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

from headrace_planner.validation import Cell, RequestTimes, StepSums, Trial

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_suffix(".json")
CODE = ("client", "core", "decode_service", "kernels", "prefill_service", "router_service")
"""Folders whose code serves the trials."""
MOST_DAYS = 90
"""From the day of measuring to the last change of that code."""
_UNIT_S = 1e-5
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Record:
    """`at` is the day of measuring; `checkpoint` the digest of what was served, `workers` how.

    `fitted` are the parameters that were fitted then; `simulated` is what 10^6 requests took, {} if that never ran.
    """

    at: str
    num_rounds: int
    checkpoint: str
    workers: Mapping[str, Any]
    machine: Mapping[str, Any]
    simulated: Mapping[str, Any]
    fitted: Mapping[str, Any]
    trials: Sequence[Trial]

    @classmethod
    def load(cls, path: Path = RECORD) -> Self:
        """Read what `save` wrote."""
        value: dict[str, Any] = json.loads(path.read_text())
        value |= {"trials": [_unpacked(trial) for trial in value["trials"]]}
        return cls(**value)

    def save(self, path: Path = RECORD) -> None:
        """Write it, a trial a line."""
        head = {name: value for name, value in asdict(self).items() if name != "trials"}
        lines = ",\n".join(json.dumps(_packed(trial), separators=(",", ":")) for trial in self.trials)
        path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "trials": [\n{lines}\n]}}\n')

    def days_behind(self, changed: date) -> int:
        """Return the days from the measuring to `changed`; below 0 if it is younger."""
        return (changed - date.fromisoformat(self.at)).days


def report_of(record: Record, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `planner_figures.judge` found, with when and on what it was measured."""
    facts = ("at", "num_rounds", "checkpoint", "machine", "simulated")
    return {**found, **{name: getattr(record, name) for name in facts}}


def rounded(trial: Trial) -> Trial:
    """Return the trial as the record has it."""
    return _unpacked(_packed(trial))


def digest_of(checkpoint: Path) -> str:
    """Return the digest of a checkpoint's weights and configuration."""
    found = hashlib.sha256()
    for path in sorted((*checkpoint.glob("*.safetensors"), checkpoint / "config.json")):
        found.update(path.read_bytes())
    return found.hexdigest()


def last_change() -> date | None:
    """Return the day on which the code that serves was last changed, by its commit; None where there is no history."""
    command = ["git", "log", "-1", "--format=%cs", "--", *CODE]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return date.fromisoformat(found.stdout.strip()) if found.returncode == 0 and found.stdout.strip() else None


def _packed(trial: Trial) -> dict[str, Any]:
    times = (
        (*(round(seconds / _UNIT_S) for seconds in (each.first_s, each.second_s, each.last_s)), each.num_tokens)
        for each in trial.requests
    )
    return {
        "cell": list(asdict(trial.cell).values()),
        "round": trial.round,
        "prefill": _packed_steps(trial.prefill),
        "decode": _packed_steps(trial.decode),
        "wall_s": round(trial.wall_s, _DIGITS),
        "others_share": trial.others_share if trial.others_share is None else round(trial.others_share, 3),
        "num_discarded": trial.num_discarded,
        "requests": [value for each in times for value in each],
    }


def _packed_steps(steps: StepSums) -> list[float]:
    return [int(steps.num_steps), round(steps.seconds, _DIGITS), int(steps.num_tokens)]


def _unpacked(value: Mapping[str, Any]) -> Trial:
    requests = [
        RequestTimes(first * _UNIT_S, second * _UNIT_S, last * _UNIT_S, num_tokens)
        for first, second, last, num_tokens in zip(*[iter(value["requests"])] * 4, strict=True)
    ]
    parts: dict[str, Any] = {**value, "cell": Cell(*value["cell"]), "requests": requests}
    parts |= {name: StepSums(*value[name]) for name in ("prefill", "decode")}
    return Trial(**parts)
