"""A holder that computes nothing, for tests of takers: pages of zeros, always the same first token, real control."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from headrace.v1 import hold_service_pb2 as pb

from headrace_core.batch.step import Mark
from headrace_core.beats import Outbox
from headrace_core.errors import HandoffLostError, HeadraceError
from headrace_core.kv.layout import KvLayout
from headrace_core.request import SampledToken
from headrace_core.rpc import Server
from headrace_core.transfer.grpc import SERVICE, GrpcHolder
from headrace_core.transfer.hold import HOLD_SERVICE, Held, add_hold_servicer
from headrace_core.transfer.lease import Lease, LeaseTable
from headrace_core.transfer.transport import Holding
from headrace_core.transfer.values import (
    Admission,
    FirstToken,
    Order,
    Run,
    Shard,
    encode_admission,
    encode_first,
    encode_run,
)
from headrace_core.transfer.verify import checksums

FIRST_TOKEN = 1
Rewrite = Callable[[pb.HoldResponse], list[pb.HoldResponse]]


def _as_it_is(event: pb.HoldResponse) -> list[pb.HoldResponse]:
    return [event]


class _Zeros:
    """`PageMemory` of a few pages."""

    def __init__(self, layout: KvLayout, num_pages: int) -> None:
        self._size = layout.page_layer_bytes
        self._layers = [memoryview(bytearray(num_pages * self._size)) for _ in range(layout.num_layers)]

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        return self._layers[layer][page_id * self._size : (page_id + 1) * self._size]

    def host_layers(self) -> Sequence[memoryview]:
        return self._layers

    def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
        """They are there."""

    def copy_from_host(self, page_ids: Sequence[int], layers: range) -> None:
        """They are there."""


@dataclass(slots=True, eq=False)
class _MiniHeld:
    holder: MiniHolder
    lease: Lease
    outbox: Outbox[pb.HoldResponse]

    def confirm(self) -> None:
        self.holder.leases.confirm(self.lease)
        self.holder.num_confirmed += 1
        self.holder.say(self.outbox, pb.HoldResponse(confirmed=pb.Confirmed()))
        self.outbox.close()

    def end(self) -> None:
        self.holder.leases.abort(self.lease, HandoffLostError("TAKER_LOST", "the taker ended the call"))


class MiniHolder:
    """Use as an async context. `rewrite` changes what is said, `error` ends a call after its first token, if set."""

    def __init__(self, layout: KvLayout, fingerprint: str, *, num_pages: int = 8) -> None:
        self.layout = layout
        self._fingerprint = fingerprint
        self._num_pages = num_pages
        self._incarnation = secrets.randbits(63) | 1
        self.memory = _Zeros(layout, num_pages)
        self.rewrite: Rewrite = _as_it_is
        self.error: HeadraceError | None = None
        self.is_silent = False
        self.orders: list[Order] = []
        self.num_confirmed = 0
        self.generation = 0
        self.on_sealed: Callable[[], None] = lambda: None
        """Called when checksums are taken, before the taker is told."""
        self.leases = LeaseTable(
            incarnation=self._incarnation,
            generation=lambda _: self.generation,
            on_end=lambda _: None,
            on_change=lambda: None,
        )
        self._end = GrpcHolder(
            Holding(lambda: self.leases, lambda: self.memory, self._incarnation, 64 << 10, lambda _: None)
        )
        self._server = Server([HOLD_SERVICE, SERVICE])
        self.address = ""

    async def __aenter__(self) -> Self:
        add_hold_servicer(self, self._server.grpc)
        self._end.serve(self._server.grpc)
        self.address = self._server.bind("127.0.0.1:0")
        await self._server.grpc.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.grpc.stop(0)

    def reset(self) -> None:
        """Do again what a holder should."""
        self.rewrite, self.on_sealed, self.error, self.is_silent = _as_it_is, (lambda: None), None, False
        self.memory = _Zeros(self.layout, self._num_pages)

    def hold(self, order: Order, outbox: Outbox[pb.HoldResponse]) -> Held:
        """See `hold.Holder`."""
        self.orders.append(order)
        lease = self.leases.create(order)
        if self.is_silent:
            outbox.period_s = 1e6
        self.leases.admit(lease)
        offers = (self._end.offer(),)
        shard = Shard(self.address, self._incarnation, 0, self.layout.num_layers, offers)
        admission = Admission(self._fingerprint, self.layout, lease.lease_key, 0, 0.0, (shard,))
        self.say(outbox, pb.HoldResponse(admitted=encode_admission(admission)))
        page_ids = range(order.num_have_pages, self.layout.num_pages(len(order.spec.token_ids)))
        if page_ids:
            sums = checksums(self.memory, range(self.layout.num_layers), page_ids)
            run = Run(0, page_ids[0], tuple(page_ids), (self.generation,) * len(page_ids), sums)
            self.leases.seal(lease, run)
            self.on_sealed()
            self.say(outbox, pb.HoldResponse(run=encode_run(run)))
        self.leases.complete(lease)
        spec = order.spec
        first = FirstToken(
            num_tokens=len(spec.token_ids),
            tokens_sha256=order.tokens_sha256,
            token=SampledToken(FIRST_TOKEN),
            seed=spec.params.seed or 0,
            sample_index=spec.sample_index,
            finish=None,
            compute_s=0.0,
        )
        self.say(outbox, pb.HoldResponse(last=encode_first(first)))
        if self.error is not None:
            outbox.close(self.error)
        return _MiniHeld(self, lease, outbox)

    def say(self, outbox: Outbox[pb.HoldResponse], event: pb.HoldResponse) -> None:
        """Put an event into a call, as `rewrite` would have it."""
        for changed in self.rewrite(event):
            outbox.put(changed)

    async def wait_free(self) -> None:
        """Return when no call is left."""
        await self.leases.wait_idle()
