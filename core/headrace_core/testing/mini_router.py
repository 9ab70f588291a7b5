"""The least that a router does, for tests of workers: prefill, start, collect, let go; no retries, queue or text."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio
from headrace.v1 import (
    decode_service_pb2,
    decode_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
    types_pb2,
)

from headrace_core.errors import HeadraceError
from headrace_core.request import FinishReason, SamplingParams
from headrace_core.rpc import channel, raised_from
from headrace_core.testing.async_test import WAIT_S
from headrace_core.wire import decode_failure, decode_finish, encode_sampling

_SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
"""A connection that buffers little, so that who does not read is soon noticed."""


@dataclass(slots=True)
class Collected:
    """What a sequence's stream brought."""

    token_ids: list[int] = field(default_factory=list[int])
    finish: FinishReason | None = None
    failure: HeadraceError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_tokens(self, count: int) -> None:
        """Return when `count` tokens came, or the sequence ended."""
        while len(self.token_ids) < count and not self.is_over:
            self.changed.clear()
            async with asyncio.timeout(WAIT_S):
                await self.changed.wait()

    async def wait_end(self) -> None:
        """Return when the sequence ended."""
        await self.wait_tokens(1 << 62)

    @property
    def is_over(self) -> bool:
        """Whether the last message came."""
        return self.finish is not None or self.failure is not None


class MiniRouter:
    """Use as an async context: it opens one session. Failed calls raise what the worker raised."""

    def __init__(
        self, *, prefill: str = "", decode: str = "", session_id: str = "session", is_reading: bool = True
    ) -> None:
        """Without `is_reading` the stream is only read from `read` on."""
        self._is_reading = is_reading
        self._channels: list[grpc.aio.Channel] = []
        self.session_id = session_id
        self._prefill: Any = prefill_service_pb2_grpc.PrefillServiceStub(self._open(prefill)) if prefill else None
        self._decode: Any = decode_service_pb2_grpc.DecodeServiceStub(self._open(decode)) if decode else None
        self._stream: Any = None
        self._reading: asyncio.Task[None] | None = None
        self._transfer: Any = transfer_service_pb2_grpc.TransferServiceStub(self._channels[0]) if prefill else None
        self._tickets: list[transfer_service_pb2.ReleaseLeaseRequest] = []
        self._num_started = 0
        self.outputs: dict[int, Collected] = {}
        self.stream_error: HeadraceError | None = None

    async def __aenter__(self) -> Self:
        if self._decode:
            self._stream = self._decode.StreamSteps(decode_service_pb2.StreamStepsRequest(session_id=self.session_id))
            await self._stream.read()
            if self._is_reading:
                self.read()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_session()
        await self._release_tickets()
        for open_channel in self._channels:
            await open_channel.close()

    def read(self) -> None:
        """Begin to read the stream."""
        self._reading = asyncio.ensure_future(self._read())

    async def close_session(self) -> None:
        """End the stream, as a router does that goes away. Idempotent."""
        if self._reading:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        if self._stream:
            self._stream.cancel()

    async def prefill(
        self,
        request_id: str,
        token_ids: list[int],
        *,
        params: SamplingParams,
        attempt: int = 1,
        num_prompt_tokens: int = 0,
        sample_index: int = 0,
    ) -> prefill_service_pb2.PrefillResponse:
        """Call `PrefillService.Prefill`."""
        request = prefill_service_pb2.PrefillRequest(
            request_id=request_id,
            attempt=attempt,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            sampling=encode_sampling(params),
            sample_index=sample_index,
        )
        response = await _raising(self._prefill.Prefill(request, timeout=WAIT_S))
        lease_id, incarnation = response.handoff.lease.lease_id, response.handoff.holder_incarnation
        self._tickets.append(
            transfer_service_pb2.ReleaseLeaseRequest(lease_id=lease_id, holder_incarnation=incarnation)
        )
        return response

    async def cancel_prefill(self, request_id: str, *, attempt: int) -> None:
        """Abort a sample's attempts up to `attempt` at the prefill worker."""
        request = prefill_service_pb2.CancelPrefillRequest(request_id=request_id, attempt=attempt)
        await _raising(self._prefill.CancelPrefill(request, timeout=WAIT_S))

    async def start(
        self,
        request_id: str,
        token_ids: list[int],
        *,
        params: SamplingParams,
        handoff: types_pb2.Handoff | None = None,
        attempt: int = 1,
        num_prompt_tokens: int = 0,
        sample_index: int = 0,
    ) -> tuple[Collected, decode_service_pb2.StartResponse]:
        """Call `DecodeService.Start`; return what collects the outputs, and the answer."""
        self._num_started += 1
        collected = self.outputs[self._num_started] = Collected()
        request = decode_service_pb2.StartRequest(
            session_id=self.session_id,
            sequence_number=self._num_started,
            request_id=request_id,
            attempt=attempt,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            sampling=encode_sampling(params),
            sample_index=sample_index,
            handoff=handoff,
        )
        return collected, await _raising(self._decode.Start(request, timeout=WAIT_S))

    async def cancel(self, number: int) -> None:
        """Call `DecodeService.Cancel`."""
        request = decode_service_pb2.CancelRequest(session_id=self.session_id, sequence_number=number)
        await _raising(self._decode.Cancel(request, timeout=WAIT_S))

    async def generate(
        self, request_id: str, token_ids: list[int], *, params: SamplingParams, **kwargs: int
    ) -> list[int]:
        """Return all output tokens of a request that is handed off."""
        response = await self.prefill(request_id, token_ids, params=params, **kwargs)
        if response.finish_reason:
            return [response.handoff.first_token_id]
        collected, _ = await self.start(request_id, token_ids, params=params, handoff=response.handoff, **kwargs)
        await collected.wait_end()
        if collected.failure:
            raise collected.failure
        return [response.handoff.first_token_id, *collected.token_ids]

    async def generate_colocated(self, request_id: str, token_ids: list[int], *, params: SamplingParams) -> list[int]:
        """Return all output tokens of a request that the decode worker prefills itself."""
        collected, _ = await self.start(request_id, token_ids, params=params)
        await collected.wait_end()
        if collected.failure:
            raise collected.failure
        return collected.token_ids

    async def _release_tickets(self) -> None:
        """Let go of what was not taken, as a router does. Of what was taken this is no error."""
        for ticket in self._tickets:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._transfer.ReleaseLease(ticket, timeout=WAIT_S)

    async def _read(self) -> None:
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                for output in message.outputs:
                    collected = self.outputs[output.sequence_number]
                    collected.token_ids += output.token_ids
                    collected.finish = decode_finish(output.finish_reason)
                    if output.HasField("failure"):
                        collected.failure = decode_failure(output.failure)
                    collected.changed.set()
        except grpc.aio.AioRpcError as error:
            self.stream_error = raised_from(error)

    def _open(self, address: str) -> grpc.aio.Channel:
        opened = channel(address) if self._is_reading else grpc.aio.insecure_channel(address, options=_SMALL_WINDOW)
        self._channels.append(opened)
        return opened


async def _raising(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise raised_from(error) from error
