"""Streams and events. Nothing runs beside anything here, but what the host has not waited for it does not see.

What a stream does on the device is done as soon as it is launched. Only copies are under way until the host waits for
their stream, for an event behind them, or for anything that stands behind those.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from threading import local

from headrace_core.testing.pretend_gpu import graph, under_way


class Stream:
    """In place of `torch.cuda.Stream`."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority = priority

    def wait_stream(self, stream: Stream) -> None:
        """Go on behind what `stream` holds now."""
        under_way.join(self, under_way.behind(stream))

    def wait_event(self, event: Event) -> None:
        """Go on behind what `event` stands behind."""
        under_way.join(self, event.copies)

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event, `event` or a new one, behind what this stream holds now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Say whether all is done."""
        graph.refuse_in_capture("a stream's query")
        return not under_way.behind(self)

    def synchronize(self) -> None:
        """Let the host wait."""
        under_way.wait("a stream's synchronize", under_way.behind(self))


class Event:
    """In place of `torch.cuda.Event`. Times are the host's and mean nothing."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._is_timed = enable_timing
        self._recorded_s: float | None = None
        self.copies: list[under_way.UnderWay] = []

    def record(self, stream: Stream | None = None) -> None:
        """Stand behind what `stream`, None: the current one, holds now."""
        self.copies = under_way.behind(stream or current_stream())
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Let `stream`, None: the current one, go on behind this event."""
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        """Say whether all before it is done."""
        graph.refuse_in_capture("an event's query")
        return not any(map(under_way.is_under_way, self.copies))

    def synchronize(self) -> None:
        """Let the host wait; not for an event that was never recorded."""
        graph.refuse_in_capture("an event's synchronize")
        if self._recorded_s is not None:
            under_way.wait("an event's synchronize", self.copies)

    def elapsed_time(self, end_event: Event) -> float:
        """Return ms between two events; RuntimeError where torch has one."""
        if not (self._is_timed and end_event._is_timed):
            raise RuntimeError("both events must be created with enable_timing=True")
        if self._recorded_s is None or end_event._recorded_s is None:
            raise RuntimeError("both events must be recorded before calculating elapsed time")
        return (end_event._recorded_s - self._recorded_s) * 1e3


_DEFAULT = Stream()
_current = local()


def current_stream(device: object = None) -> Stream:
    """In place of `torch.cuda.current_stream`."""
    return getattr(_current, "stream", _DEFAULT)


def default_stream(device: object = None) -> Stream:
    """In place of `torch.cuda.default_stream`."""
    return _DEFAULT


@contextmanager
def stream(chosen: Stream | None) -> Generator[None]:
    """In place of `torch.cuda.stream`."""
    before = current_stream()
    _current.stream = chosen or before
    try:
        yield
    finally:
        _current.stream = before


def synchronize(device: object = None) -> None:
    """In place of `torch.cuda.synchronize`."""
    under_way.wait("torch.cuda.synchronize")
