"""A span, and inside it one stage after the other without gaps: how workers trace what they do for a sequence."""

from __future__ import annotations

from headrace_core.tracing.span import NONE, Attributes, Kind, Span


class Stages:
    """Ends with `end`; costs next to nothing where the span is not recorded."""

    def __init__(self, span: Span, first: str) -> None:
        """Begin `first`, the first stage."""
        self.span = span
        self._stage = span.child(first)

    @property
    def traceparent(self) -> str:
        """For who is asked to do something in this stage."""
        return self._stage.traceparent

    def next(self, name: str, *, kind: Kind = Kind.INTERNAL) -> None:
        """End the stage and begin the next."""
        self._stage.end()
        self._stage = self.span.child(name, kind=kind)

    def event(self, name: str, attributes: Attributes = NONE) -> None:
        """Say what happened in this stage just now."""
        self._stage.event(name, attributes)

    def end(self, reason: str = "", attributes: Attributes = NONE) -> None:
        """End the stage and the span, of which `attributes` say more; with `reason` both failed."""
        self.span.set(attributes)
        for span in (self._stage, self.span):
            if reason:
                span.fail(reason)
            span.end()
