"""The plots: what may happen, paragraph by paragraph, as written in `plots.txt`.

In that file `# name: theme` begins a plot and `= name` a beat that plots share. A beat is a group
of lines between blank ones, each line a wording of which a story takes one; `@name` stands for a
shared beat, and `---` ends a paragraph. In a wording `[a|b]` takes one alternative and `{slot}` is
filled from the world of the story. A hero's name (`{n}`) always follows a space, so that it is
always cut into the same tokens: no paragraph and no speech begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

Beat = tuple[str, ...]
_SOURCE = Path(__file__).with_name("plots.txt")


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot."""

    theme: str
    """What the hero does, to follow "a fox named Zimbo who" in a request."""
    paragraphs: list[list[Beat]] = field(default_factory=lambda: [[]])


def parse_plots(text: str) -> tuple[dict[str, Beat], dict[str, Plot]]:
    """Read shared beats and plots, each by its name and in the order of `text`.

    Raises:
        KeyError: a plot uses a shared beat that no earlier line made.
    """
    shared: dict[str, Beat] = {}
    plots: dict[str, Plot] = {}
    sharing = ""
    plot = Plot("")
    for group in text.strip().split("\n\n"):
        lines = tuple(group.splitlines())
        mark, rest = lines[0][0], lines[0][1:].strip()
        if mark == "=":
            sharing = rest
        elif mark == "#":
            name, _, theme = rest.partition(": ")
            plot, sharing = Plot(theme), ""
            plots[name] = plot
        elif lines[0] == "---":
            plot.paragraphs.append([])
        elif sharing:
            shared[sharing] = lines
        else:
            plot.paragraphs[-1].append(shared[rest] if mark == "@" else lines)
    return shared, plots


_SHARED, PLOTS = parse_plots(_SOURCE.read_text(encoding="utf-8"))
OPENING = _SHARED["opening"]
BARE_OPENING = _SHARED["bare opening"]
