"""The asyncio client: the blocking one's methods as coroutines."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import generation_service_pb2_grpc as pb_grpc
from headrace_core.rpc import channel

from headrace_client.arguments import timeout_of
from headrace_client.codec import Collector, Reader, decode_server_info, encode_request
from headrace_client.connection import DEFAULT_ADDRESS, INFO_TIMEOUT_S, Connection, ConnectionOptions
from headrace_client.results import Delta, Generation, Prompt, ServerInfo
from headrace_client.retry import Attempts
from headrace_client.sampling import SamplingParams
from headrace_client.service_level import ServiceLevel


class AsyncClient:
    """A connection to a router. Made and used on one event loop; an async context manager, or await `close`."""

    def __init__(self, address: str = DEFAULT_ADDRESS, options: ConnectionOptions | None = None) -> None:
        self.address = address
        self._connection = Connection(address, options or ConnectionOptions())
        self._channel = channel(address, tls=self._connection.options.tls(), by_proxy=True)
        self._stub: Any = pb_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way, which ends with CLIENT_CLOSED, and disconnect."""
        self._connection.is_closed = True
        await self._channel.close()

    async def generate(
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
        """Generate and return the whole answer. Arguments and errors are `Client.generate`'s."""
        collector = Collector()
        async with self.stream(
            prompt,
            sampling,
            service_level=service_level,
            n=n,
            model=model,
            request_id=request_id,
            timeout_s=timeout_s,
            include_timings=include_timings,
        ) as stream:
            async for delta in stream:
                collector.add(delta)
        return collector.generation()

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
    ) -> AsyncStream:
        """Start generating and return the pieces as they come. Arguments and errors are `Client.stream`'s."""
        request = encode_request(
            prompt,
            sampling,
            service_level=service_level,
            n=n,
            model=model,
            request_id=request_id,
            include_timings=include_timings,
        )
        return AsyncStream(self._stub, request, timeout_s, self._connection)

    async def server_info(self, *, timeout_s: float = INFO_TIMEOUT_S) -> ServerInfo:
        """Return what the router serves and with which workers. Errors are `Client.server_info`'s."""
        connection = self._connection
        attempts = Attempts(connection.options.retry, timeout_of(timeout_s))
        request = pb.GetServerInfoRequest()
        while True:
            connection.check_open()
            try:
                info = await self._stub.GetServerInfo(
                    request, timeout=attempts.remaining_s(), metadata=connection.options.metadata()
                )
                return decode_server_info(info)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_after(connection.error_from(error)))
            except asyncio.CancelledError:
                if not _is_cancelling():
                    connection.check_open()
                raise


class AsyncStream:
    """One request's pieces: an async iterator and an async context manager.

    Leaving the `async with` block, `aclose`, `cancel`, dropping the stream, or cancelling the task that waits for a
    piece cancels the request, which frees everything it holds; iterating then ends.
    """

    def __init__(
        self,
        stub: Any,
        request: pb.GenerateRequest,
        timeout_s: float | None,
        connection: Connection,
    ) -> None:
        self._stub = stub
        self._request = request
        self._connection = connection
        self._attempts = Attempts(connection.options.retry, timeout_of(timeout_s))
        self._reader = Reader(request)
        self._is_cancelled = False
        self._has_answer = False
        self._call: Any = None
        self._call = self._open()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """Return the next piece. Raises what `Client.generate` lists."""
        while True:
            try:
                return await self._read()
            except grpc.RpcError as rpc_error:
                if self._is_cancelled:
                    raise StopAsyncIteration from None
                error = self._connection.error_from(rpc_error, has_answer=self._has_answer)
                if self._has_answer:
                    raise self._attempts.final(error, has_answer=True) from None
                await self._retry_after(self._attempts.pause_after(error))
            except asyncio.CancelledError:
                # grpc.aio raises this for a call that was cancelled here, too: that ends the stream, not the task.
                if not _is_cancelling():
                    if self._is_cancelled:
                        raise StopAsyncIteration from None
                    self._connection.check_open()
                self.cancel()
                raise
            except BaseException:
                self._call.cancel()
                raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # A stream that outlives its event loop was cancelled with it.
        with contextlib.suppress(RuntimeError):
            self.cancel()

    def cancel(self) -> None:
        """End the request; nothing if it has ended."""
        self._is_cancelled = True
        if self._call:
            self._call.cancel()

    async def aclose(self) -> None:
        """Do what `cancel` does, under the name that async iterators use."""
        self.cancel()

    def _open(self) -> Any:
        self._connection.check_open()
        metadata = self._connection.options.metadata()
        return self._stub.Generate(self._request, timeout=self._attempts.remaining_s(), metadata=metadata)

    async def _read(self) -> Delta:
        response = await self._call.read()
        if response is grpc.aio.EOF:
            if not self._is_cancelled:
                self._reader.end()
            raise StopAsyncIteration
        self._has_answer = True
        return self._reader.read(response)

    async def _retry_after(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        if self._is_cancelled:
            raise StopAsyncIteration
        self._call = self._open()


def _is_cancelling() -> bool:
    """Return whether somebody cancels this task, and not only the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
