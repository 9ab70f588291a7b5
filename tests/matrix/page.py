"""Writes the table of docs/reliability.md from build/matrix.json: `python -m tests.matrix.page`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.matrix.table import EVENTS, PHASES, WHERE, Event

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- matrix: written by python -m tests.matrix.page -->", "<!-- end of matrix -->"


def rows(ends: Mapping[tuple[str, str], str]) -> list[list[str]]:
    """Return the table's rows: the event's title, then each phase's end, or the number of why there is none."""
    reasons = why_not()
    return [
        [event.title, *(ends.get((event.name, phase), f"({_number(event, phase, reasons)})") for phase in PHASES)]
        for event in EVENTS
    ]


def wanted_ends() -> dict[tuple[str, str], str]:
    """Return how every cell must end, by event and phase."""
    return {(event.name, phase): f"`{end}`" for event in EVENTS for phase, end in event.ends.items()}


def why_not() -> list[str]:
    """Return the reasons why cells can't be, each once, in the order of the table."""
    return list(dict.fromkeys(event.excluded[phase] for event in EVENTS for phase in PHASES if phase in event.excluded))


def read_rows(page: str) -> list[list[str]]:
    """Return the rows of a page's table, without what was measured."""
    part = page[page.index(BEGIN) : page.index(END)]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [line[: 1 + len(PHASES)] for line in lines[2:]]


def render(report: Mapping[str, Any]) -> str:
    """Return the generated part of the page."""
    cells: Sequence[Mapping[str, Any]] = report["cells"]
    ends = {(cell["event"], cell["phase"]): _end(cells, cell["event"], cell["phase"]) for cell in cells}
    head = ["event", *PHASES, "attempts failed with", "pages free after, s"]
    lines = [_line(head), _line(["---"] * len(PHASES) + ["---", "---", "--:"])]
    for event, row in zip(EVENTS, rows(ends), strict=True):
        own = [cell for cell in cells if cell["event"] == event.name]
        causes = sorted({cause for cell in own for cause in cell["causes"]})
        free_s = max((cell["free_s"] for cell in own), default=0.0)
        lines.append(_line([*row, ", ".join(causes) or "none", f"{free_s:.1f}"]))
    machine, transports = report["machine"], sorted({cell["transport"] for cell in cells})
    made = (
        f"{len(cells)} cells over {', '.join(transports)}, {sum(bool(cell['problems']) for cell in cells)} failed; "
        f"`{machine['commit'][:10]}`, {machine['date'][:10]}, {machine['cores']} cores."
    )
    notes = [f"({number}) {reason}." for number, reason in enumerate(why_not(), 1)]
    where = [f"- **{phase}**: {WHERE[phase]}." for phase in PHASES]
    return "\n\n".join([BEGIN, "\n".join(where), "\n".join(lines), "\n".join(f"- {note}" for note in notes), made, END])


def _end(cells: Iterable[Mapping[str, Any]], event: str, phase: str) -> str:
    """Return how a cell ended over every transport."""
    found = [cell for cell in cells if (cell["event"], cell["phase"]) == (event, phase)]
    return ", ".join(dict.fromkeys("**failed**" if cell["problems"] else f"`{cell['end']}`" for cell in found))


def _number(event: Event, phase: str, reasons: Sequence[str]) -> int:
    reason = event.excluded.get(phase)
    return 1 + reasons.index(reason) if reason else 0


def _line(fields: Iterable[str]) -> str:
    return f"| {' | '.join(fields)} |"


def main() -> None:
    """Rewrite the generated part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "matrix.json")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    part = render(json.loads(arguments.json.read_text()))
    PAGE.write_text(page[: page.index(BEGIN)] + part + page[page.index(END) + len(END) :])


if __name__ == "__main__":
    main()
