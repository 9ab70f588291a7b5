"""Both ends of a hand-off as a fake worker has them: the real control, no bytes. See `fake_worker`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio
from headrace.v1 import hold_service_pb2 as pb

from headrace_core.beats import Outbox
from headrace_core.errors import HandoffLostError, HeadraceError, ProtocolError
from headrace_core.request import SampledToken, TokenLogprobs, hash_tokens
from headrace_core.testing.fake_script import finish_of
from headrace_core.transfer.hold import HoldCall, Side, TakeError
from headrace_core.transfer.values import (
    Admission,
    FirstToken,
    Order,
    Shard,
    decode_admission,
    decode_first,
    encode_admission,
    encode_first,
    replaced,
)
from headrace_core.wire import decode_layout

if TYPE_CHECKING:
    from headrace_core.testing.fake_worker import FakeWorker


@dataclass(slots=True, eq=False)
class FakeHeld:
    """One Hold call at its holder. See `hold.Held`."""

    worker: FakeWorker
    order: Order
    outbox: Outbox[pb.HoldResponse]
    num_pages: int = 0
    task: asyncio.Task[None] | None = None

    def confirm(self) -> None:
        """See `hold.Held`."""
        self.outbox.put(pb.HoldResponse(confirmed=pb.Confirmed()))
        self.outbox.close()

    def end(self) -> None:
        """See `hold.Held`."""
        if self.task is not None:
            self.task.cancel()
        self.num_pages = 0
        if self.worker.held.get(self.order.owner) is self:
            del self.worker.held[self.order.owner]
        self.worker.on_change()

    def begin(self) -> None:
        """Compute what was ordered."""
        self.task = asyncio.create_task(self._prefill())

    async def _prefill(self) -> None:
        worker, spec = self.worker, self.order.spec
        try:
            await worker.faults.prefill_gate.wait()
            if worker.faults.prefill:
                raise worker.faults.prefill.popleft()
            tokens = [*spec.token_ids, worker.next_token(spec.token_ids, spec.num_prompt_tokens)]
            finish = finish_of(worker.info, tokens, spec.num_prompt_tokens, spec.params)
            layout = decode_layout(worker.info.layout)
            shard = Shard(worker.address, worker.incarnation, 0, layout.num_layers, ())
            admission = Admission(worker.info.model_fingerprint, layout, "lease", 0, 20e-6, (shard,))
            self.outbox.put(pb.HoldResponse(admitted=encode_admission(admission)))
            if not finish:
                self.num_pages = layout.num_pages(len(spec.token_ids))
                worker.on_change()
                await worker.faults.answer_gate.wait()
            assert spec.params.seed is not None, "the router draws one"
            logprobs = None if spec.params.top_logprobs is None else TokenLogprobs(-0.5, ((tokens[-1], -0.5),))
            first = FirstToken(
                num_tokens=len(spec.token_ids),
                tokens_sha256=hash_tokens(spec.token_ids),
                token=SampledToken(tokens[-1], logprobs),
                seed=spec.params.seed,
                sample_index=spec.sample_index,
                finish=finish,
                compute_s=300e-6,
            )
            self.outbox.put(pb.HoldResponse(last=encode_first(first)))
            if finish:
                self.outbox.close()
        except HeadraceError as error:
            self.outbox.close(error)


def hold(worker: FakeWorker, order: Order, outbox: Outbox[pb.HoldResponse]) -> FakeHeld:
    """See `hold.Holder`."""
    earlier = worker.held.get(order.owner)
    if earlier is not None:
        earlier.outbox.close(replaced(order.spec.attempt))
        earlier.end()
    held = worker.held[order.owner] = FakeHeld(worker, order, outbox)
    held.begin()
    worker.on_change()
    return held


class FakeTake:
    """Takes one sequence as a decode worker does, but for its bytes. Use as an async context."""

    def __init__(self, channel: grpc.aio.Channel, order: Order, address: str) -> None:
        self._call = HoldCall(channel, order, address)
        self._events = aiter(self._call.events())

    async def __aenter__(self) -> FakeTake:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def first(self) -> tuple[Admission, FirstToken]:
        """Return the first token.

        Raises:
            TakeError: there will be none.
        """
        admission = decode_admission((await self._next("admitted")).admitted)
        return admission, decode_first((await self._next("last")).last)

    async def confirm(self) -> None:
        """Say that everything is here, and wait for the answer.

        Raises:
            TakeError: it was not the sequence's any more.
        """
        self._call.confirm()
        await self._next("confirmed")

    async def _next(self, event: str) -> pb.HoldResponse:
        try:
            response = await anext(self._events)
        except StopAsyncIteration:
            raise TakeError(Side.HOLDER, HandoffLostError("HOLDER_LOST", "the holder ended the call")) from None
        if response.WhichOneof("event") != event:
            raise TakeError(Side.HOLDER, ProtocolError("PROTOCOL", f"expected {event}"))
        return response
