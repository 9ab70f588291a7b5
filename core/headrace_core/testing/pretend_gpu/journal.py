"""What host and device do to each other, while somebody wants to know: waits, copies, launches, each with its place."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

_NOT_A_PLACE = (f"{Path(__file__).parent}/", f"{Path(torch.__file__).parent}/", "/contextlib.py")


@dataclass(frozen=True, slots=True)
class Wait:
    """The host waited for the device: `what` made it wait, `place` is the line that asked for it."""

    what: str
    place: str


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that went between host and device; `is_waited_for`: the host went on only when they had arrived."""

    to: Literal["device", "host"]
    num_bytes: int
    is_pinned: bool
    is_waited_for: bool
    place: str


@dataclass(slots=True)
class Journal:
    """In the order in which they happened. `launches` are names of kernels and of torch's operations."""

    waits: list[Wait] = field(default_factory=list[Wait])
    copies: list[Copy] = field(default_factory=list[Copy])
    launches: list[str] = field(default_factory=list[str])


_open: list[Journal] = []


@contextmanager
def recording() -> Generator[Journal]:
    """Yield a journal of what all threads do from here on; inside `pretend_gpu`. Replays of a graph are one launch."""
    journal = Journal()
    _open.append(journal)
    try:
        yield journal
    finally:
        # By identity: journals of the same content are equal.
        _open[:] = [each for each in _open if each is not journal]


def note_wait(what: str) -> None:
    """Enter that the host waits."""
    if _open:
        entry = Wait(what, place())
        for journal in _open:
            journal.waits.append(entry)


def note_copy(to: Literal["device", "host"], num_bytes: int, *, is_pinned: bool, is_waited_for: bool) -> None:
    """Enter a copy, and the wait if it is one."""
    if not _open:
        return
    entry = Copy(to, num_bytes, is_pinned, is_waited_for, place())
    for journal in _open:
        journal.copies.append(entry)
        if is_waited_for:
            journal.waits.append(Wait(f"copy of {num_bytes} bytes to the {to}", entry.place))


def note_launch(name: str) -> None:
    """Enter a launch."""
    for journal in _open:
        journal.launches.append(name)


def place() -> str:
    """Return the innermost line that is neither torch's nor the pretended GPU's, as "file:line in function"."""
    frame = sys._getframe()
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _NOT_A_PLACE):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_name}"
