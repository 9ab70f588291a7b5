"""What honest callers send to the services that every process has: health and reflection."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from headrace_core.identity import Role

from tests.rogue.flood import Target

_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def standard_targets(server: Role) -> list[Target]:
    """Return them at one process."""
    check = health_pb2.HealthCheckRequest(service="grpc.health.v1.Health")
    ask = reflection_pb2.ServerReflectionRequest
    extension = reflection_pb2.ExtensionRequest(containing_type="headrace.v1.StepEntry", extension_number=7)
    questions = [
        ask(host="h", list_services="*"),
        ask(host="h", file_by_filename="headrace/v1/types.proto"),
        ask(host="h", file_containing_symbol="headrace.v1.SamplingParams"),
        ask(host="h", file_containing_extension=extension),
        ask(host="h", all_extension_numbers_of_type="headrace.v1.StepEntry"),
    ]
    return [
        Target(_HEALTH + "Check", Role.OPERATOR, server, [check]),
        # It has no fields: whatever can be read is answered.
        Target(_HEALTH + "List", Role.OPERATOR, server, [health_pb2.HealthListRequest()]),
        Target(_HEALTH + "Watch", Role.OPERATOR, server, [check], 1),
        Target(_REFLECTION, Role.OPERATOR, server, questions, len(questions)),
    ]
