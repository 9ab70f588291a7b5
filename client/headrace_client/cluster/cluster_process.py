"""One process of a local cluster: starting it, its ready file, its lines, its end.

STARTING ──ready file──► SERVING ──exit──► ENDED
    └──────────exit─────────────────────────┘
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Role = Literal["router", "prefill", "decode", "both"]
LogSink = Callable[[str, str], None]
"""Called with a process's name and one line it printed, without the line's end; from that process's reader thread.
Must not raise: a process whose lines nobody reads stops when its pipe is full."""

_REFUSAL = re.compile(r" E can't start reason=\w+ problem=(.+)")
"""The line of `headrace_core.process` before such an end."""
_LINES_KEPT = 200
_LINES_SHOWN = 15
_READER_END_S = 2.0


class ClusterProcess:
    """One process. Any thread.

    Made on a thread that must outlive the process: on Linux the process dies with it (`child_process`).
    """

    def __init__(
        self,
        name: str,
        role: Role,
        *,
        command: Sequence[str],
        env: Mapping[str, str],
        ready_file: Path,
        log_sink: LogSink | None,
        rank: int = 0,
    ) -> None:
        """Args: `rank` is which process of a worker it is: only 0 serves, and says where."""
        self.name = name
        self.role: Role = role
        self.rank = rank
        self.address = ""
        """`host:port` that it serves; empty while it starts."""
        self.metrics_address = ""
        """`host:port` of its Prometheus metrics; empty while it starts."""
        self.http_address = ""
        """Of a router that serves OpenAI's API."""
        self._ready_file = ready_file
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._log_sink = log_sink
        self._popen = subprocess.Popen(
            # -P: a file in the working folder must not stand in for a module.
            [sys.executable, "-P", "-m", "headrace_client.cluster.child_process", *command],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal is for the parent, which then ends its children in order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{name}-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it ended; return whether it did."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def terminate(self) -> None:
        """Ask it to drain and exit (SIGTERM), also when it is stopped. Nothing if it ended."""
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it and what it started, at once (SIGKILL). Nothing if it ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Send any signal, such as SIGSTOP. Nothing if it ended."""
        self._popen.send_signal(number)

    def lines(self) -> list[str]:
        """Return the last lines it printed, at most 200."""
        return list(self._lines)

    def last_words(self) -> str:
        """Return how it ended, if it did, and its last lines, for an error message."""
        code = self.poll()
        if code is None:
            state = "it still runs"
        else:
            self._reader.join(_READER_END_S)
            state = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code}"
        lines = self.lines()[-_LINES_SHOWN:]
        return "\n    ".join([f"{state} and printed:", *lines]) if lines else f"{state} and printed nothing"

    def problem(self) -> str:
        """Return why it did not start: its own reason in a line, or how it ended and its last lines."""
        words = self.last_words()  # waits for its last line
        for line in reversed(self.lines()):
            if match := _REFUSAL.search(line):
                return f"can't start: {match[1]}"
        return f"could not start; {words}"

    def read_ready(self) -> bool:
        """Read the ready file, if it is there; return whether it was."""
        if not self._ready_file.exists():
            return False
        ready: dict[str, Any] = json.loads(self._ready_file.read_text())
        self.address = ready["address"]
        self.metrics_address = ready["metrics_address"]
        self.http_address = ready.get("http_address", "")
        return True

    def close(self) -> None:
        """Free the pipes of an ended process, after its last lines were read."""
        self._reader.join(_READER_END_S)
        assert self._popen.stdin, "made with a pipe"
        self._popen.stdin.close()

    def _read(self) -> None:
        assert self._popen.stdout, "made with a pipe"
        with self._popen.stdout as stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                self._lines.append(line)
                if self._log_sink:
                    self._log_sink(self.name, line)
