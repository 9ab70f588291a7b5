"""The blocking client."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

import grpc
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import generation_service_pb2_grpc as pb_grpc
from headrace_core.rpc import blocking_channel

from headrace_client.arguments import timeout_of
from headrace_client.codec import Reader, collect, decode_server_info, encode_request
from headrace_client.connection import DEFAULT_ADDRESS, INFO_TIMEOUT_S, Connection, ConnectionOptions
from headrace_client.results import Delta, Generation, Prompt, ServerInfo
from headrace_client.retry import Attempts
from headrace_client.sampling import SamplingParams
from headrace_client.service_level import ServiceLevel


class Client:
    """A connection to a router. Any thread may use it; a context manager, or call `close`.

    Nothing is sent before the first call, so a router that is not there is an error of the call.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, options: ConnectionOptions | None = None) -> None:
        self.address = address
        self.options = options or ConnectionOptions()
        self._connection = Connection(address, self.options)
        self._channel = blocking_channel(address, tls=self.options.tls(), by_proxy=True)
        self._stub = pb_grpc.GenerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way, which ends with CLIENT_CLOSED, and disconnect."""
        self._connection.is_closed = True
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        service_level: ServiceLevel | None = None,
        n: int = 1,
        model: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
        include_timings: bool = False,
    ) -> Generation:
        """Generate and return the whole answer.

        Args:
            prompt: text, token ids, or `ChatMessage`s.
            sampling: how tokens are chosen; None: the defaults.
            service_level: how soon tokens should come; None: as the caller's key says, else no target.
            n: independent samples, 1 to 16.
            model: its name; empty: the one served.
            request_id: for logs, 1 to 64 characters of [A-Za-z0-9_-], not necessarily unique; empty: the router
                chooses.
            timeout_s: for all tries together; None: the router's own limit.
            include_timings: measure where the time went.

        Raises:
            InvalidRequestError: it can't succeed as written: EMPTY_PROMPT, PROMPT_TOO_LONG, BAD_SAMPLING, BAD_REQUEST,
                BAD_TOKEN; CLIENT_CLOSED.
            NotFoundError: UNKNOWN_MODEL.
            OverloadedError: QUEUE_FULL, SLO_UNREACHABLE, also after retries.
            UnavailableError: UNREACHABLE, NO_WORKERS, DRAINING, also after retries; RETRIES_EXHAUSTED.
            DeadlineError: `timeout_s` passed.
            HeadraceError: anything else; its `reason` says what.
        """
        with self.stream(
            prompt,
            sampling,
            service_level=service_level,
            n=n,
            model=model,
            request_id=request_id,
            timeout_s=timeout_s,
            include_timings=include_timings,
        ) as stream:
            return collect(stream)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        service_level: ServiceLevel | None = None,
        n: int = 1,
        model: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
        include_timings: bool = False,
    ) -> Stream:
        """Start generating and return the pieces as they come. Arguments are `generate`'s.

        Raises:
            InvalidRequestError: as `generate`, for what can be seen here; every other error comes from iterating.
        """
        request = encode_request(
            prompt,
            sampling,
            service_level=service_level,
            n=n,
            model=model,
            request_id=request_id,
            include_timings=include_timings,
        )
        return Stream(self._stub, request, timeout_s, self._connection)

    def server_info(self, *, timeout_s: float = INFO_TIMEOUT_S) -> ServerInfo:
        """Return what the router serves and with which workers.

        Raises:
            UnavailableError: UNREACHABLE, also after retries.
            DeadlineError: `timeout_s` passed.
        """
        connection = self._connection
        attempts = Attempts(connection.options.retry, timeout_of(timeout_s))
        request = pb.GetServerInfoRequest()
        while True:
            connection.check_open()
            try:
                info = self._stub.GetServerInfo(
                    request, timeout=attempts.remaining_s(), metadata=connection.options.metadata()
                )
                return decode_server_info(info)
            except grpc.RpcError as error:
                time.sleep(attempts.pause_after(connection.error_from(error)))


class Stream:
    """One request's pieces: an iterator and a context manager.

    Leaving the `with` block, `close`, or dropping the stream cancels the request, which frees everything it holds;
    iterating then ends. Iterate on one thread; `cancel` from any.
    """

    def __init__(
        self,
        stub: pb_grpc.GenerationServiceStub,
        request: pb.GenerateRequest,
        timeout_s: float | None,
        connection: Connection,
    ) -> None:
        self._stub = stub
        self._request = request
        self._connection = connection
        self._attempts = Attempts(connection.options.retry, timeout_of(timeout_s))
        self._reader = Reader(request)
        self._cancelled = threading.Event()
        self._has_answer = False
        self._call: Any = None
        self._call = self._open()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        """Return the next piece. Raises what `Client.generate` lists."""
        while True:
            try:
                return self._read()
            except grpc.RpcError as rpc_error:
                if self._cancelled.is_set():
                    raise StopIteration from None
                error = self._connection.error_from(rpc_error, has_answer=self._has_answer)
                if self._has_answer:
                    raise self._attempts.final(error, has_answer=True) from None
                self._retry_after(self._attempts.pause_after(error))
            except BaseException:
                self._call.cancel()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; nothing if it has ended."""
        self._cancelled.set()
        if self._call:
            self._call.cancel()

    def close(self) -> None:
        """Do what `cancel` does, under the name that iterators use."""
        self.cancel()

    def _open(self) -> Any:
        self._connection.check_open()
        metadata = self._connection.options.metadata()
        return self._stub.Generate(self._request, timeout=self._attempts.remaining_s(), metadata=metadata)

    def _read(self) -> Delta:
        try:
            response = next(self._call)
        except StopIteration:
            if not self._cancelled.is_set():
                self._reader.end()
            raise
        self._has_answer = True
        return self._reader.read(response)

    def _retry_after(self, pause_s: float) -> None:
        if self._cancelled.wait(pause_s):
            raise StopIteration
        self._call = self._open()
