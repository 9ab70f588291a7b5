"""While a request is silent: what it waits for, in a line on standard error, and an end to it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import Self

from headrace_core.errors import DeadlineError, HeadraceError, UnavailableError
from rich.text import Text

from headrace_client.client import Client, Stream
from headrace_client.commands.terminal import stderr, stdout
from headrace_client.connection import cause_of
from headrace_client.results import ServerInfo
from headrace_client.retry import RetryPolicy

_SILENT_S = 0.5
"""From then on it is said what is waited for."""
_LOOK_S = 1.0
_ANSWER_S = 1.0


class Waiting:
    """A context manager around the reading of a stream: asks the router, on a thread of its own, why nothing comes.

    Leaving it raises `UnavailableError` (NO_WORKERS) if it ended the stream, because the router had no workers for
    `limit_s`.
    """

    def __init__(self, client: Client, stream: Stream, *, limit_s: float) -> None:
        self._client = Client(client.address, replace(client.options, retry=RetryPolicy(max_attempts=1)))
        self._stream = stream
        self._limit_s = limit_s
        self._is_over = threading.Event()
        self._heard_s = time.monotonic()
        self._has_text = False
        self._error: HeadraceError | None = None
        self._thread = threading.Thread(target=self._watch, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._client.close()  # which ends a question under way
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def heard(self) -> None:
        """A piece came: begin to count again."""
        self._heard_s = time.monotonic()
        self._has_text = True

    def _watch(self) -> None:
        said, since_s = "", 0.0  # of this silence; and since when workers lack, 0: they do not
        pause_s = _SILENT_S
        while not self._is_over.wait(pause_s):
            pause_s = self._silent_in_s()
            if pause_s > 0:
                said, since_s = "", 0.0
                continue
            missing, is_lacking = self._ask()
            pause_s = _LOOK_S
            if self._is_over.is_set():
                return
            since_s = (since_s or self._heard_s) if is_lacking else 0.0
            waited_s = time.monotonic() - since_s
            if is_lacking and waited_s >= self._limit_s:
                self._error = UnavailableError("NO_WORKERS", f"{missing} (given up after {waited_s:.1f} s)")
                self._stream.cancel()
                return
            if missing and missing != said:
                self._say(missing)
                said = missing

    def _silent_in_s(self) -> float:
        return max(0.0, self._heard_s + _SILENT_S - time.monotonic())

    def _ask(self) -> tuple[str, bool]:
        """Return what the request waits for, empty if for nothing but its answer; and whether it is workers."""
        try:
            info = self._client.server_info(timeout_s=_ANSWER_S)
        except DeadlineError:
            return f"the router at {self._client.address} does not answer", False
        except HeadraceError as error:
            return str(error), False
        if lack := lacking(info):
            return lack, True
        is_queued = info.num_queued > 0 and not self._has_text
        return f"{info.num_queued} requests wait for room, {info.num_running} are under way" if is_queued else "", False

    def _say(self, missing: str) -> None:
        start = "\n" if self._has_text and stdout.is_terminal else ""
        stderr.print(Text(f"{start}waiting: {missing}", style="dim"), soft_wrap=True)


def lacking(info: ServerInfo) -> str:
    """Return what the router lacks to serve any request, and what it knows of who could; empty if nothing."""
    ready = {worker.role for worker in info.workers if worker.state == "ready"}
    roles = [role for role in ("prefill", "decode") if not ready & {role, "both"}]
    if not roles:
        return ""
    lack = f"no {' and no '.join(roles)} worker is ready"
    known = [
        f"{worker.address} is {worker.state}" + (f" ({cause_of(worker.detail)})" if worker.detail else "")
        for worker in info.workers
        if worker.state != "ready"
    ]
    return "; ".join([lack, ", ".join(known) or "the router knows of no other"])
