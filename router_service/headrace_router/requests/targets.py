"""What a request wants of its speed: what it says itself, else its class, else the class of its key."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.v1 import generation_service_pb2
from headrace_core.errors import InvalidRequestError
from headrace_core.slo import NO_TARGETS, Targets, class_of


def targets_of(
    message: generation_service_pb2.GenerateRequest, classes: Mapping[str, Targets], key_class: str
) -> Targets:
    """Return a request's targets.

    Raises:
        InvalidRequestError: BAD_REQUEST, it names a class that there is not.
    """
    if not key_class and not message.HasField("service_level"):
        return NO_TARGETS
    level = message.service_level
    targets = class_of(classes, level.slo_class or key_class)
    if targets is None:
        known = ", ".join(sorted(classes)) or "none: see --slo-classes"
        problem = f"slo_class is {level.slo_class[:40]!r}; this router has {known}"
        raise InvalidRequestError("BAD_REQUEST", problem, param="slo_class")
    own = Targets.of_ms(level.ttft_ms, level.itl_ms)
    return Targets(
        own.ttft_s if level.HasField("ttft_ms") else targets.ttft_s,
        own.itl_s if level.HasField("itl_ms") else targets.itl_s,
    )
