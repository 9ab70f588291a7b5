"""A holder of pages as those who check it see it: what they order of it, how they read, what it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio
from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import transfer_service_pb2
from headrace.v1.transfer_service_pb2_grpc import TransferServiceStub

from headrace_core.errors import HeadraceError
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.rpc import channel, raised_from
from headrace_core.testing.mini_taker import MiniTaker, Ordered
from headrace_core.testing.rules import EXPECTED, require_refusal
from headrace_core.transfer.values import Run
from headrace_core.wire import decode_layout

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)


class HolderUnderTest:
    """A holder, and a taker that speaks to it."""

    def __init__(self, taker: MiniTaker, address: str) -> None:
        self.taker = taker
        self.info = taker.info
        self.layout = decode_layout(taker.info.layout)
        self.channel = channel(address)
        size = self.layout.page_size
        self.prompt = [1 + index % (self.info.vocab_size - 1) for index in range(2 * size + max(1, size // 2))]
        self._num_orders = 0
        self._more: dict[str, Any] = {}
        """Said in every order."""

    def order(
        self, request_id: str = "", token_ids: list[int] | None = None, *, params: SamplingParams = GREEDY, **more: Any
    ) -> Ordered:
        """Order `prompt` or other tokens, as a sequence that nobody ordered before; `more` as for `MiniTaker.order`."""
        self._num_orders += 1
        request_id = request_id or f"order-{self._num_orders}"
        return self.taker.order(request_id, token_ids or self.prompt, params=params, **(self._more | more))

    async def refused(self, change: Callable[[pb.Open], None], reason: str) -> None:
        """Require that an order which `change` made wrong is refused with `reason`."""
        error = await self.order(change=change).refused()
        require_refusal(error, EXPECTED[reason], reason)

    async def request(self, ordered: Ordered, run: Run, **other: Any) -> transfer_service_pb2.PullRequest:
        """Return what asks for a run; `other` fields are set otherwise."""
        admission = await ordered.wait_admitted()
        fields: dict[str, Any] = {
            "lease_key": admission.lease_key,
            "incarnation": admission.shards[0].incarnation,
            "first_layer": run.first_layer,
            "num_layers": run.num_layers,
            "first_page": run.first_page,
            "num_pages": run.num_pages,
            "tokens_sha256": hash_tokens(self.prompt),
        }
        return transfer_service_pb2.PullRequest(**(fields | other))

    async def pull(self, request: transfer_service_pb2.PullRequest) -> list[bytes]:
        """Return the frames.

        Raises:
            HeadraceError: it is refused.
        """
        stub: Any = TransferServiceStub(self.channel)
        try:
            return [frame.payload async for frame in stub.Pull(request)]
        except grpc.aio.AioRpcError as error:
            raise raised_from(error) from error

    async def pull_refused(self, request: transfer_service_pb2.PullRequest, reason: str) -> None:
        """Require that a pull is refused with `reason`."""
        refusal: HeadraceError | None = None
        try:
            await self.pull(request)
        except HeadraceError as error:
            refusal = error
        require_refusal(refusal, EXPECTED[reason], reason)
