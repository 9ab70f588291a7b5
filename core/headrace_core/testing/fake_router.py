"""A router without workers: a real gRPC server in this process that plays back scripts, for tests of clients.

    with FakeRouter([*answer("Once", " upon")], [OverloadedError("QUEUE_FULL", "full")]) as router:
        Client(router.address).generate("...")     # plays the first script; the second call plays the second

It generates nothing, checks nothing of a request and keeps no queue. The last script is played again for every
further call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from types import TracebackType
from typing import Any, Self

import grpc
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import generation_service_pb2_grpc as pb_grpc
from headrace.v1 import types_pb2

from headrace_core.errors import HeadraceError
from headrace_core.grpc_options import MAX_MESSAGE_BYTES
from headrace_core.rpc import REASON_KEY, status_code
from headrace_core.testing.async_test import WAIT_S

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.so_reuseport", 0),
]


class Hold(Enum):
    """A step that waits until the client cancels, its deadline passes, or the server stops."""

    UNTIL_CANCELLED = "until cancelled"


Step = pb.GenerateResponse | HeadraceError | grpc.StatusCode | tuple[grpc.StatusCode, str] | Hold
"""Send; fail as our routers do; fail as a transport does, without our reason, with details or any; wait."""


class FakeRouter(pb_grpc.GenerationServiceServicer):
    """Serves `scripts` on a free port of this machine. A context manager; its records may be read on any thread."""

    def __init__(
        self,
        *scripts: Sequence[Step],
        infos: Sequence[pb.GetServerInfoResponse | HeadraceError] = (),
        token: str = "",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.requests: list[pb.GenerateRequest] = []
        """Every request received, in order."""
        self.cancelled = threading.Event()
        """Set when a client cancelled a call or its deadline passed."""
        self._scripts = [list(script) for script in scripts] or [list(answer("A", " story."))]
        self._infos = list(infos) or [default_info()]
        self._token = token
        self._server = grpc.server(ThreadPoolExecutor(max_workers=8), options=_OPTIONS)
        pb_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        if credentials:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        else:
            port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        """Play the next script."""
        self._check_token(context)
        script = self._scripts[min(len(self.requests), len(self._scripts) - 1)]
        self.requests.append(request)
        call = _Call(context, self.cancelled)
        for step in script:
            match step:
                case pb.GenerateResponse():
                    yield step
                case Hold():
                    call.ended.wait(WAIT_S)
                    return
                case HeadraceError():
                    call.is_over = True
                    _abort(context, step)
                case grpc.StatusCode():
                    call.is_over = True
                    context.abort(step, "played by a script")
                case (code, details):
                    call.is_over = True
                    context.abort(code, details)
        call.is_over = True

    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        """Answer with the next of `infos`; the last one again and again."""
        self._check_token(context)
        info = self._infos.pop(0) if len(self._infos) > 1 else self._infos[0]
        if isinstance(info, HeadraceError):
            _abort(context, info)
        assert isinstance(info, pb.GetServerInfoResponse), "abort raises"
        return info

    def _check_token(self, context: Any) -> None:
        if self._token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {self._token}":
            context.set_trailing_metadata(((REASON_KEY, "BAD_API_KEY"),))
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "send a key of the router")


class _Call:
    """Tells a call that its client ended from one that its script ended."""

    def __init__(self, context: Any, cancelled: threading.Event) -> None:
        self.ended = threading.Event()
        self.is_over = False
        self._cancelled = cancelled
        if not context.add_callback(self._on_end):
            self._on_end()

    def _on_end(self) -> None:
        self.ended.set()
        if not self.is_over:
            self._cancelled.set()


def answer(*texts: str, sample_index: int = 0, with_timings: bool = True) -> Iterator[pb.GenerateResponse]:
    """Yield a whole sample: one response, with one token, for each text; the last one ends it."""
    for position, text in enumerate(texts):
        response = pb.GenerateResponse(sample_index=sample_index, text=text, token_ids=[100 + position])
        entry = response.logprobs.add(logprob=-0.5 * (position + 1), token=text.encode())
        entry.top.add(token_id=7, logprob=-0.25, token=b" likelier")
        if position == 0:
            response.request_id = "fake-1"
        if position == len(texts) - 1:
            response.finish_reason = types_pb2.FINISH_REASON_STOP
            response.usage.CopyFrom(pb.Usage(num_prompt_tokens=3, num_output_tokens=len(texts), num_cached_tokens=1))
            if with_timings:
                response.timings.CopyFrom(default_timings())
        yield response


def default_timings() -> pb.Timings:
    """Return the timings of a disaggregated request; the phases sum to the total."""
    phases = {
        "tokenize": 300,
        "queue": 700,
        "prefill": 8_000,
        "prefill_rpc": 1_000,
        "transfer": 2_000,
        "decode": 88_000,
    }
    timings = pb.Timings(
        total_us=100_000,
        ttft_us=10_000,
        transfer_bytes=655_360,
        num_transfer_pages=2,
        transport="grpc",
        num_attempts=1,
        prefill_worker="127.0.0.1:1001",
        decode_worker="127.0.0.1:1002",
        hidden_transfer_us=6_000,
        hidden_transfer_bytes=491_520,
    )
    for position, (name, duration_us) in enumerate(phases.items()):
        timings.phases.add(name=name, duration_us=duration_us, is_before_first_token=position < 4)
    return timings


def default_info() -> pb.GetServerInfoResponse:
    """Return a router with a prefill and a decode worker that are ready, and a decode worker that is not reachable."""
    info = pb.GetServerInfoResponse(
        model_name="fake-model",
        model_fingerprint="0123456789abcdef",
        max_context_tokens=4096,
        num_running=1,
        version="0",
    )
    info.workers.add(
        address="127.0.0.1:1001",
        role=types_pb2.WORKER_ROLE_PREFILL,
        state="ready",
        num_pages=128,
        num_free_pages=100,
        num_running=2,
        num_waiting=3,
        num_leases=4,
        transports=["grpc"],
    )
    info.workers.add(
        address="127.0.0.1:1003",
        role=types_pb2.WORKER_ROLE_DECODE,
        state="ready",
        num_pages=128,
        transports=["shm", "grpc"],
        transport_in_use="shm",
        transfer_bytes_per_s=1_500 << 20,
    )
    info.workers.add(address="127.0.0.1:1002", state="unreachable", detail="connection refused", num_pages=0)
    return info


def _abort(context: Any, error: HeadraceError) -> None:
    context.set_trailing_metadata(((REASON_KEY, error.reason),))
    context.abort(status_code(error), str(error))
