"""The standard health service, with one status for all of a process's services.

Not grpcio-health-checking's servicer: that one writes to a watcher under the lock that a change of status needs, so a
watcher that does not read keeps the process from saying NOT_SERVING.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace_core.errors import NotFoundError

_MESSAGES: Any = health_pb2
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Serves `grpc.health.v1.Health`; NOT_SERVING at first. Event loop only."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take the services' names; the empty one, the whole process, is added."""
        self._names = frozenset((*names, ""))
        self._status = _NOT_SERVING
        self._changed = asyncio.Event()
        """Set when the status changes, and replaced."""

    def set_ready(self, is_ready: bool) -> None:
        """Change what everybody is told."""
        self._status = _SERVING if is_ready else _NOT_SERVING
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """Answer with the status now."""
        if request.service not in self._names:
            raise NotFoundError("UNKNOWN_SERVICE", f"there is no service {request.service[:80]!r} here")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def List(self, request: Any, context: Any) -> Any:
        """Answer with every service's status now; its messages are newer than the stubs that types are checked by."""
        response: Any = _MESSAGES.HealthListResponse()
        for name in self._names:
            response.statuses[name].status = self._status
        return response

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Send the status now and whenever it is another one; a change that a slow reader missed is skipped."""
        last = None
        while True:
            changed = self._changed
            status = self._status if request.service in self._names else _SERVICE_UNKNOWN
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await changed.wait()
