"""The least that a router does, for tests of workers: start, collect, cancel; no retries, queue or text."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import decode_service_pb2_grpc

from headrace_core.beats import Outbox
from headrace_core.errors import HeadraceError
from headrace_core.request import FinishReason, SamplingParams
from headrace_core.rpc import channel, raised_from
from headrace_core.testing.async_test import WAIT_S
from headrace_core.transfer.values import CachedPrefix, encode_cached
from headrace_core.wire import decode_failure, decode_finish, encode_sampling

_SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
"""A connection that buffers little, so that who does not read is soon noticed."""


@dataclass(slots=True)
class Collected:
    """What was told of a sequence; `token_ids` with the one that came from a prefill worker."""

    number: int
    attempt: int
    num_known: int
    """Tokens that it had at its start."""
    token_ids: list[int] = field(default_factory=list[int])
    finish: FinishReason | None = None
    failure: HeadraceError | None = None
    side: int = pb.FAILURE_SIDE_UNSPECIFIED
    prefilled: pb.Prefilled | None = None
    joined: pb.Joined | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_tokens(self, count: int) -> None:
        """Return when `count` tokens came, or the sequence ended."""
        while len(self.token_ids) < count and not self.is_over:
            await self._change()

    async def wait_joined(self) -> pb.Joined | None:
        """Return what was told when it joined; None if the sequence ended before.

        Raises:
            HeadraceError: it failed before.
        """
        while self.joined is None and not self.is_over:
            await self._change()
        if self.joined is None and self.failure is not None:
            raise self.failure
        return self.joined

    async def wait_end(self) -> None:
        """Return when the sequence ended."""
        while not self.is_over:
            await self._change()

    async def wait_failure(self) -> HeadraceError:
        """Return what the sequence failed with."""
        await self.wait_end()
        assert self.failure is not None, f"it ended well: {self.finish}"
        return self.failure

    async def tokens(self) -> list[int]:
        """Return all of its tokens when it ended.

        Raises:
            HeadraceError: it failed.
        """
        await self.wait_end()
        if self.failure is not None:
            raise self.failure
        return self.token_ids

    @property
    def is_over(self) -> bool:
        """Whether the last entry came."""
        return self.finish is not None or self.failure is not None

    def take(self, entry: pb.StepEntry) -> None:
        """Take what was told; an attempt is told everything once, in order."""
        known = self.num_known + len(self.token_ids)
        assert entry.position == known, f"an entry at {entry.position} of {known} tokens"
        assert not self.is_over, "an entry after the last"
        match entry.WhichOneof("event"):
            case "prefilled":
                self.prefilled = entry.prefilled
                self.token_ids.append(entry.prefilled.token_id)
                self.finish = decode_finish(entry.prefilled.finish_reason)
            case "joined":
                self.joined = entry.joined
            case "tokens":
                self.token_ids += entry.tokens.token_ids
                self.finish = decode_finish(entry.tokens.finish_reason)
            case _:
                self.failure = decode_failure(entry.failure)
                self.side = entry.failure.side
        self.changed.set()

    async def _change(self) -> None:
        self.changed.clear()
        async with asyncio.timeout(WAIT_S):
            await self.changed.wait()


class MiniRouter:
    """Use as an async context: it opens one session."""

    def __init__(
        self,
        *,
        decode: str,
        prefill: str = "",
        router_id: int = 0,
        is_reading: bool = True,
        worker_incarnation: int | None = None,
    ) -> None:
        """Sequences are prefilled at `prefill`, if there is one. Without `is_reading` nothing is read until `read`."""
        self.prefill_address = prefill
        self.router_id = router_id or secrets.randbits(63) | 1
        self._worker_incarnation = worker_incarnation
        self._is_reading = is_reading
        self._channel = channel(decode) if is_reading else grpc.aio.insecure_channel(decode, options=_SMALL_WINDOW)
        self._stub: Any = decode_service_pb2_grpc.DecodeServiceStub(self._channel)
        self._outbox: Outbox[pb.SessionRequest] = Outbox(pb.SessionRequest())
        self._call: Any = None
        self._reading: asyncio.Task[None] | None = None
        self._numbers: dict[tuple[str, int], int] = {}
        self.outputs: dict[tuple[int, int], Collected] = {}
        """By number and attempt."""
        self.num_beats = 0
        self.stream_error: HeadraceError | None = None

    async def __aenter__(self) -> Self:
        opening = pb.OpenSession(router_id=self.router_id, worker_incarnation=self._worker_incarnation)
        self._outbox.put(pb.SessionRequest(open=opening))
        self._call = self._stub.Session(aiter(self._outbox))
        try:
            await anext(aiter(self._call))
        except grpc.aio.AioRpcError as error:
            await self._channel.close()
            raise raised_from(error) from error
        if self._is_reading:
            self.read()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_session()
        await self._channel.close()

    def read(self) -> None:
        """Begin to read the session."""
        self._reading = asyncio.ensure_future(self._read())

    def fall_silent(self) -> None:
        """Send no beats any more, as one whose event loop is dead."""
        self._outbox.period_s = WAIT_S

    async def close_session(self) -> None:
        """End the session, as a router does that goes away. Idempotent."""
        if self._reading:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        self._outbox.close()
        if self._call:
            self._call.cancel()

    def start(
        self,
        request_id: str,
        token_ids: list[int],
        *,
        params: SamplingParams,
        attempt: int = 1,
        num_prompt_tokens: int = 0,
        sample_index: int = 0,
        prefill: str | None = None,
        local_below: int = 0,
        cached: CachedPrefix | None = None,
        takes_prefix: bool = False,
        timeout_s: float = WAIT_S,
    ) -> Collected:
        """Start a sequence; attempts at one have the same `request_id` and `sample_index`. `prefill`: another one's."""
        number = self._numbers.setdefault((request_id, sample_index), len(self._numbers) + 1)
        collected = self.outputs[number, attempt] = Collected(number, attempt, len(token_ids))
        message = pb.StartSequence(
            sequence_number=number,
            attempt=attempt,
            request_id=request_id,
            timeout_ms=round(1000 * timeout_s),
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            sampling=encode_sampling(params),
            sample_index=sample_index,
            prefill_address=self.prefill_address if prefill is None else prefill,
            local_below=local_below,
            cached_prefix=encode_cached(cached) if cached else None,
            takes_prefix=takes_prefix,
        )
        self.send(pb.SessionRequest(start=message))
        return collected

    def send(self, message: pb.SessionRequest) -> None:
        """Send a message as it is."""
        self._outbox.put(message)

    def cancel(self, collected: Collected, *, keeps_pages: bool = False) -> None:
        """End a sequence."""
        cancel = pb.CancelSequence(sequence_number=collected.number, attempt=collected.attempt, keeps_pages=keeps_pages)
        self.send(pb.SessionRequest(cancel=cancel))

    async def generate(
        self, request_id: str, token_ids: list[int], *, params: SamplingParams, **more: Any
    ) -> list[int]:
        """Return all output tokens of a sequence; `more` as for `start`."""
        return await self.start(request_id, token_ids, params=params, **more).tokens()

    async def generate_colocated(self, request_id: str, token_ids: list[int], *, params: SamplingParams) -> list[int]:
        """Return all output tokens of a sequence that the decode worker prefills itself."""
        return await self.generate(request_id, token_ids, params=params, prefill="")

    async def _read(self) -> None:
        try:
            async for message in self._call:
                self.num_beats += not message.entries
                for entry in message.entries:
                    self.outputs[entry.sequence_number, entry.attempt].take(entry)
        except grpc.aio.AioRpcError as error:
            self.stream_error = raised_from(error)
