"""How far something is that takes long: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_INTERVAL_S = 5.0


@contextlib.contextmanager
def shown(label: str, say: Callable[[str], None] | None = None) -> Generator[Callable[[int, int], None]]:
    """Yield a function of (bytes done, bytes in all): a bar if standard error is a terminal, else lines of `say`.

    `say` None: lines of the log. Nothing is shown before the first call.
    """
    if not sys.stderr.isatty():
        yield _lines(label, say)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, visible=False)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield show


def _lines(label: str, say: Callable[[str], None] | None) -> Callable[[int, int], None]:
    last_s = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s < _INTERVAL_S:
            return
        last_s = time.monotonic()
        percent = round(100 * done / max(total, 1))
        if say is None:
            log.info(label, extra={"bytes": done, "total_bytes": total, "percent": percent})
        else:
            say(f"{label}: {percent} % of {total / 1e9:.2f} GB")

    return show
