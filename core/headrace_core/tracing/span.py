"""Traces: what one request did in every process, as spans. What this file has does nothing.

It is what a process holds that was started without `--trace-sample`, and what a request gets that is not sampled: so
nobody asks whether there is a trace, and none costs nothing. `otel.py` has spans that are recorded.

A trace is made by whoever has a request first, and followed by everybody else: a worker makes spans for what it was
told to (`traceparent` of StartSequence and Open), and chooses nothing itself. Nothing here is called for each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]
NONE: Attributes = {}


class Kind(Enum):
    """A span's side of a call."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


class Span:
    """A piece of work that took time; here one that is not recorded. Times are of `time.monotonic()`, seconds."""

    is_recorded = False

    @property
    def traceparent(self) -> str:
        """What another process needs to go on under this span, in W3C's form; empty if it need not."""
        return ""

    @property
    def trace_id(self) -> str:
        """The trace's name, 32 hexadecimal digits; empty without one."""
        return ""

    def child(
        self,
        name: str,
        *,
        start_s: float | None = None,
        kind: Kind = Kind.INTERNAL,
        attributes: Attributes = NONE,
        after: Span | None = None,
    ) -> Span:
        """Begin a part of this one, now or at `start_s`; `after` links it to the span whose work it does again."""
        del name, start_s, kind, attributes, after
        return self

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""

    def event(self, name: str, attributes: Attributes = NONE) -> None:
        """Say what happened just now."""

    def fail(self, reason: str) -> None:
        """Say that it failed, by a reason of `reasons.py`."""

    def end(self, at_s: float | None = None) -> None:
        """End it, now or at `at_s`. Only the first end counts."""


NOT_TRACED = Span()


class Tracer:
    """Begins spans in one process; this one none."""

    def begin(
        self, name: str, metadata: Iterable[tuple[str, str | bytes]], *, start_s: float, attributes: Attributes = NONE
    ) -> Span:
        """Begin to serve a call: in its caller's trace, if `metadata` names one that is sampled, else in a new one."""
        del name, metadata, start_s, attributes
        return NOT_TRACED

    def join(self, name: str, traceparent: str, attributes: Attributes = NONE) -> Span:
        """Begin to serve what another of our processes asks for; recorded if that one's span is."""
        del name, traceparent, attributes
        return NOT_TRACED

    async def close(self) -> None:
        """Send what is left, for a short time."""
