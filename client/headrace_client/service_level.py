"""How soon a caller wants tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Targets for a request's speed; one that can't have its target is refused with SLO_UNREACHABLE.

    `slo_class` is one of the router's `--slo-classes`; empty: that of the caller's key, else none. `ttft_ms` is the
    most time until the first token of the first sample and `itl_ms` the most between two tokens, in whole milliseconds,
    in place of the class's; 0: no target, None: as the class says. Of one client's requests that wait those of a lower
    `priority` start first, whatever their targets.
    """

    slo_class: str = ""
    ttft_ms: int | None = None
    itl_ms: int | None = None
    priority: int = 0
