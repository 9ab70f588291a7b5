"""Standard input, output and error for a command, whatever it was started with.

It may be a pipe that nobody reads any more, a file on a full disk, or nothing at all.

`guard` makes standard output end the command where it can't be written: in silence and with 141 when its reader went
away, as the commands of a pipeline end (128 + SIGPIPE), else with one line on standard error and 1. No command needs
to know of it: `SystemExit` runs through every `with` and `finally`. Lines that standard error can't take are dropped.
Imports next to nothing: it is done before everything else.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, NoReturn, TextIO

UNREAD = 141
"""Exit code when nobody reads the output any more: 128 + SIGPIPE."""

_DAY_S = 86_400.0


class _Output(io.FileIO):
    """A file descriptor; what can't be written ends the command."""

    def write(self, data: Any) -> int:
        """Write; wait if the descriptor does not block.

        Raises:
            SystemExit: it can't be written.
        """
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            self._end(error)
        return written

    def _end(self, error: OSError) -> NoReturn:
        # What is buffered is written once more when Python ends: to where it hurts nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(UNREAD)
        why = "it is closed" if error.errno == errno.EBADF else error.strerror
        sys.stderr.write(f"error: can't write to standard output: {why}\n")
        raise SystemExit(1)


class _Complaints(io.FileIO):
    """A file descriptor; what can't be written is dropped."""

    def write(self, data: Any) -> int:
        """Write, or not."""
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def guard() -> None:
    """Replace the streams of `sys`. Characters that an encoding lacks are written as question marks."""
    # In the order of their numbers: one that is closed gets the lowest number that is free, which is its own.
    if _is_closed(sys.stdin):
        sys.stdin = open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")  # noqa: SIM115 - as long as the process
    # Only to be read: writing to it fails, and is reported as anything else that fails.
    out = os.open(os.devnull, os.O_RDONLY) if _is_closed(sys.stdout) else sys.stdout.fileno()
    err = os.open(os.devnull, os.O_WRONLY) if _is_closed(sys.stderr) else sys.stderr.fileno()
    sys.stderr = _text(_Complaints(err, "w", closefd=False), sys.stderr, is_line_buffered=True)
    sys.stdout = _text(_Output(out, "w", closefd=False), sys.stdout, is_line_buffered=os.isatty(out))


def wait(seconds: float) -> None:
    """Sleep, a day at most, unless the reader of standard output goes away.

    Raises:
        SystemExit: it went away.
    """
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # a test's, which is no file
        poll.register(sys.stdout, 0)  # errors are always reported
    if any(event & select.POLLERR for _, event in poll.poll(1000 * min(seconds, _DAY_S))):
        raise SystemExit(UNREAD)


def _is_closed(stream: TextIO | None) -> bool:
    return stream is None


def _text(raw: io.FileIO, replaced: TextIO | None, *, is_line_buffered: bool) -> io.TextIOWrapper:
    encoding = replaced.encoding if replaced is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="replace", line_buffering=is_line_buffered
    )
