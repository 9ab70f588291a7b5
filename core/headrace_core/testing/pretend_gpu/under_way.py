"""Copies that the host does not wait for: not done until it has waited for something behind them.

Till then memory of the host that a copy fills holds NaN and -1, and memory that a copy reads must stay as it is: who
writes to it gets `UnderWayError` at the next wait. So a missing wait, on a GPU a race that is lost now and then, fails
every time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace_core.testing.pretend_gpu import graph, journal
from headrace_core.testing.pretend_gpu.memory import poison


class UnderWayError(RuntimeError):
    """Memory of the host was written to while a copy from it was under way."""


@dataclass(slots=True, eq=False)
class UnderWay:
    """A copy that nobody has waited for, done when any of `streams` is.

    To the host, `value` is what `host` will hold; to the device, what it held and must still hold.
    """

    host: Tensor
    value: Tensor
    is_to_host: bool
    streams: set[object]
    place: str


_copies: list[UnderWay] = []


def start(host: Tensor, value: Tensor, stream: object, *, is_to_host: bool) -> None:
    """Begin a copy between `host` and the device, where the data are `value`."""
    _copies.append(UnderWay(host, value.clone(), is_to_host, {stream}, journal.place()))
    if is_to_host:
        poison(host)


def is_under_way(copy: UnderWay) -> bool:
    """Say whether nobody has waited for `copy` yet."""
    return copy in _copies


def behind(stream: object) -> list[UnderWay]:
    """Return the copies that are done when `stream` is."""
    return [copy for copy in _copies if stream in copy.streams]


def join(stream: object, copies: Iterable[UnderWay]) -> None:
    """Let `stream` go on behind `copies`."""
    for copy in copies:
        copy.streams.add(stream)


def wait(what: str, copies: Iterable[UnderWay] | None = None) -> None:
    """Let the host wait, by `what`, for `copies`; None: for all that the device does.

    Raises:
        CaptureError: inside a capture.
        UnderWayError: memory that one of the copies reads was written to.
    """
    graph.refuse_in_capture(what)
    journal.note_wait(what)
    finish(copies)


def finish(copies: Iterable[UnderWay] | None = None) -> None:
    """Let `copies`, None: all, be done; UnderWayError as for `wait`."""
    for copy in list(_copies) if copies is None else list(copies):
        if copy not in _copies:
            continue
        _copies.remove(copy)
        if copy.is_to_host:
            copy.host.copy_(copy.value)
        elif not torch.equal(_bytes(copy.host), _bytes(copy.value)):
            raise UnderWayError(
                f"memory that the copy at {copy.place} reads was written to before that was done: wait first, for an "
                "event recorded behind the copy"
            )


def forget() -> None:
    """Let nothing be under way."""
    _copies.clear()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
