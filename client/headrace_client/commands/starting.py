"""What `headrace up` shows of its processes: how far they are while they start, then what they say that matters.

    STARTING   a line that moves, on a terminal; a line for each process that serves; what they print is held back
    SERVING    what they print: all with --verbose, else warnings and errors
Where a start fails, what was held back is dropped: the error that follows names the reason, once.
"""

from __future__ import annotations

import os
import re
import signal
import time
from threading import Lock

from headrace_core.telemetry import level_of
from rich.status import Status
from rich.text import Text

from headrace_client.cluster.cluster_process import ClusterProcess
from headrace_client.commands.hints import reachable
from headrace_client.commands.terminal import stdout

STYLES = {"router": "magenta", "prefill": "cyan", "decode": "green", "both": "blue"}

_NAME_WIDTH = 10
_PERCENT = re.compile(r" percent=(\d+)$")


class Starting:
    """A context manager around the start; `on_line` and `on_ready` are for `LocalCluster`, from any thread."""

    def __init__(self, names: list[str], *, is_verbose: bool) -> None:
        self._is_verbose = is_verbose
        self._waiting = dict.fromkeys(names, "")
        self._held: list[tuple[str, str]] | None = []
        self._lock = Lock()
        self._began_s = time.monotonic()
        self._status = Status("", console=stdout, refresh_per_second=4) if stdout.is_terminal else None

    def __enter__(self) -> None:
        if self._status:
            self._show()
            self._status.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._status:
            self._status.stop()
        with self._lock:
            held, self._held = self._held or [], None
        for name, line in held if kind is None else []:
            print_line(name, line)

    def on_line(self, name: str, line: str) -> None:
        """Show a line that a process printed, now, later or never."""
        with self._lock:
            if (percent := _PERCENT.search(line)) and name in self._waiting:
                self._waiting[name] = f" {percent[1]} %"
                self._show()
            if not self._is_verbose and level_of(line) in ("DEBUG", "INFO"):
                return
            if self._held is not None and not self._is_verbose:
                self._held.append((name, line))
                return
        print_line(name, line)

    def on_ready(self, process: ClusterProcess) -> None:
        """Say that a process serves."""
        with self._lock:
            self._waiting.pop(process.name, None)
            self._show()
        took_s = time.monotonic() - self._began_s
        where = f"{reachable(process.address)} after {took_s:.1f} s, metrics at {reachable(process.metrics_address)}"
        stdout.print(Text(f"{process.name} is ready at {where} (pid {process.pid})", style="bold"), soft_wrap=True)

    def _show(self) -> None:
        if self._status and self._waiting:
            names = ", ".join(f"{name}{far}" for name, far in self._waiting.items())
            self._status.update(Text(f"starting {names}"))


def print_line(name: str, line: str) -> None:
    """Print what a process said, behind its name."""
    style = STYLES[name.partition("-")[0]]
    try:
        stdout.print(Text.assemble((f"{name:>{_NAME_WIDTH}} | ", style), line), soft_wrap=True)
    except (SystemExit, OSError):
        # Nobody reads any more (rich exits then): end as a pipeline's commands do, but in order.
        os.kill(os.getpid(), signal.SIGTERM)
