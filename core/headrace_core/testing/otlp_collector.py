"""An OTLP collector for tests: a real gRPC server for `TraceService`, which keeps every span that it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from headrace_core.testing.async_test import WAIT_S

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One. Ids are hexadecimal; `parent_id` is empty for a trace's first span of all."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    error: str
    """Of a status that is an error its description, else empty."""
    events: list[tuple[str, dict[str, Any]]]
    links: list[str]
    """Ids of the spans it is linked to."""

    @property
    def duration_us(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1000


class OtlpCollector(pb_grpc.TraceServiceServicer):
    """A context manager. While `may_answer` is clear it reads and does not answer."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.num_calls = 0
        self._server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.may_answer.set()
        self._server.stop(None).wait()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process sends its spans here, ten times a second."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        """See trace_service.proto."""
        self.num_calls += 1
        self.may_answer.wait(WAIT_S)
        for of_resource in request.resource_spans:
            service = _attributes(of_resource.resource.attributes).get("service.name", "")
            for of_scope in of_resource.scope_spans:
                self.spans += [_received(service, span) for span in of_scope.spans]
        return pb.ExportTraceServiceResponse()

    def wait(self, condition: Callable[[list[ReceivedSpan]], bool], what: str) -> list[ReceivedSpan]:
        """Return the spans as soon as `condition` holds of them; fail with `what` if it does not within `WAIT_S`."""
        deadline_s = time.monotonic() + WAIT_S
        while not condition(self.spans):
            assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {what}; {self.spans}"
            time.sleep(_POLL_S)
        return self.spans


def _received(service: str, span: trace_pb2.Span) -> ReceivedSpan:
    return ReceivedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        error=span.status.message if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else "",
        events=[(event.name, _attributes(event.attributes)) for event in span.events],
        links=[link.span_id.hex() for link in span.links],
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
