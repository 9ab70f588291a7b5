"""Tables for terminals of any width: where a table's columns do not fit, each of its rows is a block of lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_WIDE = 10_000


def print_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()
) -> None:
    """Print a table without cutting or folding anything, or its rows one below the other.

    Args:
        console: where to.
        columns: names; the first column says what a row is of.
        rows: a cell for each column; one that is empty is left out of a block.
        left: columns whose cells begin at the left, beside the first; figures end at the right.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Asked for on a wide terminal: on this one it would be cut to it.
    if console.measure(table, options=console.options.update(width=_WIDE)).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        console.print(row[0], style="bold", highlight=False)
        block = Table.grid(padding=(0, 2))
        for name, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                block.add_row(f"  {name}", cell)
        console.print(block)
