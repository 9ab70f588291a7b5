"""Tables that leave out what matters least where a terminal is narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

_GAP = 2

Cells = Mapping[str, str | Text]


@dataclass(frozen=True, slots=True)
class Column:
    """One. Of `rank` 0 it is always there; the highest goes first. `width`: columns that its cells usually take."""

    name: str
    rank: int
    width: int
    is_right: bool = True


def fitted(first: str, columns: Sequence[Column], rows: Sequence[tuple[str, Cells]], width: int) -> Table:
    """Return a table with a name and its cells in each row, no wider than `width` as far as ranks allow."""
    kept = list(columns)
    names = max((len(name) for name, _ in rows), default=0)
    while max(names, len(first)) + sum(_GAP + column.width for column in kept) > width:
        least = max(kept, key=lambda column: column.rank)
        if not least.rank:
            break
        kept.remove(least)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in kept:
        table.add_column(column.name, justify="right" if column.is_right else "left", no_wrap=True)
    for name, cells in rows:
        table.add_row(name, *(cells[column.name] for column in kept))
    return table
