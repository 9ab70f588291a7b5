"""A bench's JSON file: what was run where, figures, and of every request what its client saw.

    {"headrace_bench": 1, "date", "command", "machine", "target", "runs": [{"setting", "figures", "requests"}]}

A request is [intended, sent, end, prompt tokens, cached tokens or null, error, [times of deltas], [their tokens],
tokens asked for], with times in whole microseconds from the beginning of the run.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_core import __version__
from headrace_core.errors import InvalidRequestError

from headrace_client.bench.figures import Figures
from headrace_client.bench.record import Record

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One level of load."""

    setting: dict[str, Any]
    """`dataset`, `rate`, `concurrency`, and the like."""
    figures: Figures
    records: Sequence[Record]


def encode_report(runs: Sequence[Run], *, command: str, target: str) -> dict[str, Any]:
    """Return the file's content."""
    return {
        "headrace_bench": _VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "target": target,
        "machine": _machine(),
        "runs": [
            {"setting": run.setting, "figures": run.figures, "requests": [_encode(each) for each in run.records]}
            for run in runs
        ],
    }


def read_report(path: Path) -> list[Run]:
    """Read a file that a bench wrote.

    Raises:
        InvalidRequestError: BAD_REPORT, it is none.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["headrace_bench"] != _VERSION:
            raise ValueError(f"its version is {content['headrace_bench']}")
        return [
            Run(run["setting"], run["figures"], [_decode(i, each) for i, each in enumerate(run["requests"])])
            for run in content["runs"]
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{path} is no report of `headrace bench --json`: {error!r}"
        raise InvalidRequestError("BAD_REPORT", problem) from None


def _encode(record: Record) -> list[Any]:
    times = [_us(at_s) for at_s, _ in record.deltas]
    return [
        _us(record.intended_s), _us(record.sent_s), _us(record.end_s), record.num_prompt, record.num_cached,
        record.error, times, [count for _, count in record.deltas], record.num_asked,
    ]  # fmt: skip


def _decode(index: int, values: Sequence[Any]) -> Record:
    intended, sent, end, num_prompt, num_cached, error, times, counts, *asked = values
    deltas = [(at / 1e6, count) for at, count in zip(times, counts, strict=True)]
    return Record(index, intended / 1e6, sent / 1e6, deltas, end / 1e6, num_prompt, num_cached, error, *asked)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _machine() -> dict[str, Any]:
    return {
        "headrace": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
