"""A taker that takes nothing, for tests of holders: it orders, hears what is said, confirms or leaves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Self

from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import worker_service_pb2
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

from headrace_core.batch.spec import SequenceSpec
from headrace_core.errors import HeadraceError
from headrace_core.identity import ChannelTls
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.rpc import channel
from headrace_core.testing.async_test import WAIT_S
from headrace_core.transfer.hold import HoldCall, Side, TakeError
from headrace_core.transfer.values import (
    Admission,
    CachedPrefix,
    FirstToken,
    Order,
    Run,
    decode_admission,
    decode_first,
    decode_run,
)
from headrace_core.wire import decode_layout


class Ordered:
    """One Hold call, and what was heard in it."""

    def __init__(self, call: HoldCall, order: Order) -> None:
        self._call = call
        self._order = order
        self._changed = asyncio.Event()
        self.kinds: list[str] = []
        """Events, in order."""
        self.admission: Admission | None = None
        self.runs: list[Run] = []
        self.first: FirstToken | None = None
        self.is_confirmed = False
        self.error: HeadraceError | None = None
        self.side: Side | None = None
        self.is_over = False
        self.reading = asyncio.ensure_future(self._read())

    async def wait_admitted(self) -> Admission:
        """Return where the pages can be read."""
        await self.wait(lambda: self.admission is not None)
        assert self.admission is not None, "waited for it"
        return self.admission

    async def wait_first(self) -> FirstToken:
        """Return the first token."""
        await self.wait(lambda: self.first is not None)
        assert self.first is not None, "waited for it"
        return self.first

    async def wait_runs(self, count: int = 1) -> list[Run]:
        """Return what is sealed when there are `count` runs."""
        await self.wait(lambda: len(self.runs) >= count)
        return self.runs

    async def wait_all(self) -> list[Run]:
        """Return what is sealed when that is every page of the sequence, or of the prefix, that was ordered."""
        admission, order = await self.wait_admitted(), self._order
        is_prefix = order.holder_incarnation is not None
        num_tokens = admission.num_cached_tokens if is_prefix else (await self.wait_first()).num_tokens
        num_pages = max(0, admission.layout.num_pages(num_tokens) - order.num_have_pages)
        num_cells = num_pages * admission.layout.num_layers
        await self.wait(lambda: sum(run.num_pages * run.num_layers for run in self.runs) == num_cells)
        return self.runs

    async def confirm(self) -> None:
        """Say that all is here, and wait for the answer."""
        self._call.confirm()
        await self.wait(lambda: self.is_confirmed)

    def say(self, message: pb.HoldRequest) -> None:
        """Send a message as it is."""
        self._call.outbox.put(message)

    @property
    def num_beats(self) -> int:
        """Beats that came from the holder."""
        return self._call.num_beats

    def fall_silent(self) -> None:
        """Send no beats any more, as one whose event loop is dead."""
        self._call.outbox.period_s = WAIT_S

    async def cancel(self) -> None:
        """End the call. Idempotent."""
        self._call.cancel()
        self.reading.cancel()
        await asyncio.wait([self.reading])

    async def refused(self) -> HeadraceError:
        """Return what the holder ended the call with."""
        await asyncio.wait([self.reading])
        assert self.error is not None, "it was to be refused"
        return self.error

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds.

        Raises:
            HeadraceError: what the call ended with before.
        """
        async with asyncio.timeout(WAIT_S):
            while not condition():
                if self.error is not None:
                    raise self.error
                assert not self.is_over, f"the call ended after {self.kinds}"
                self._changed.clear()
                await self._changed.wait()

    async def _read(self) -> None:
        try:
            async for response in self._call.events():
                self._hear(response)
                self._changed.set()
        except TakeError as error:
            self.error, self.side = error.error, error.side
        finally:
            self.is_over = True
            self._changed.set()

    def _hear(self, response: pb.HoldResponse) -> None:
        kind = response.WhichOneof("event")
        assert kind is not None, "beats are not told"
        self.kinds.append(kind)
        match kind:
            case "admitted":
                self.admission = decode_admission(response.admitted)
            case "run":
                self.runs.append(decode_run(response.run))
            case "last":
                self.first = decode_first(response.last)
            case "confirmed":
                self.is_confirmed = True


class MiniTaker:
    """Use as an async context; on the way out every call ends."""

    def __init__(
        self,
        address: str,
        *,
        router_id: int = 0,
        tls: ChannelTls | None = None,
        asks_with: ChannelTls | None = None,
    ) -> None:
        """Args: with `tls` it orders; with `asks_with` it asks who the holder is, which takers may not."""
        self._address = address
        self._router_id = router_id or secrets.randbits(63) | 1
        self._tls = tls
        self._asks_with = asks_with
        self._channel = channel(address, tls=tls)
        self._numbers: dict[tuple[str, int], int] = {}
        self._calls: list[Ordered] = []

    async def __aenter__(self) -> Self:
        async with channel(self._address, tls=self._asks_with) as asking:
            stub = WorkerServiceStub(asking)
            self.info: worker_service_pb2.GetInfoResponse = await stub.GetInfo(
                worker_service_pb2.GetInfoRequest(), timeout=WAIT_S
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()
        await self._channel.close()

    async def leave(self) -> None:
        """End every call. Idempotent."""
        for ordered in self._calls:
            await ordered.cancel()

    def order(
        self,
        request_id: str,
        token_ids: list[int],
        *,
        params: SamplingParams,
        attempt: int = 1,
        num_prompt_tokens: int = 0,
        sample_index: int = 0,
        timeout_s: float = WAIT_S,
        num_have_tokens: int = 0,
        holder_incarnation: int | None = None,
        cached: CachedPrefix | None = None,
        change: Callable[[pb.Open], None] = lambda message: None,
    ) -> Ordered:
        """Order a sequence, or with `holder_incarnation` what is cached of it; `change` may change the message."""
        number = self._numbers.setdefault((request_id, sample_index), len(self._numbers) + 1)
        spec = SequenceSpec(request_id, attempt, sample_index, token_ids, num_prompt_tokens or len(token_ids), params)
        order = Order(
            owner=(self._router_id, number),
            spec=spec,
            timeout_s=timeout_s,
            tokens_sha256=hash_tokens(token_ids),
            fingerprint=self.info.model_fingerprint,
            layout=decode_layout(self.info.layout),
            num_have_tokens=num_have_tokens,
            cached=cached,
            holder_incarnation=holder_incarnation,
        )
        self._calls.append(Ordered(HoldCall(self._channel, order, self._address, change=change), order))
        return self._calls[-1]
