"""The taking side of hand-offs. Event loop only.

    OPENED ──Admitted──► PULLING ──Last──► FINISHING ──all verified──► CONFIRMING ──Confirmed──► TAKEN ──┐
       │                    ├──── the first token ends the sequence ───────│────────────────────► TAKEN ──┤
       └────────────────────┴──────── refused, lost, corrupt, cancelled ───┴────────────────────► FAILED ─┴──► DRAINED

What a prefix cache has is computed already: its Admitted leads from OPENED to FINISHING, and no Last comes.
Each run, from PULLING on: its turn, moved, checksums compared. DRAINED: no byte can land any more. The picture is the
table `states.TAKE_MOVES`; a holder that says what has no place in it breaks the protocol.
The pages are reserved before the call is opened: what waits here holds nothing there. A transfer's DONE proves nothing;
only the checksums make a page ours, and only the holder's last look, after all of them arrived, says that it was that
sequence's page until then. Whoever calls `take` may reuse the pages when it returns or raises: never before DRAINED.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Any

from headrace.v1 import hold_service_pb2 as pb

from headrace_core.errors import (
    HandoffLostError,
    HeadraceError,
    LayoutMismatchError,
    PermissionDeniedError,
    ProtocolError,
    TransferCorruptError,
)
from headrace_core.kv.layout import KvLayout
from headrace_core.transfer.connections import Connect, Connections, connect_to_any
from headrace_core.transfer.hold import HoldCall, Side, TakeError
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.moving import Mover
from headrace_core.transfer.moving_time import MovingTime
from headrace_core.transfer.pulls import Pulls
from headrace_core.transfer.states import TAKE_MOVES, TakeEvent, TakeState
from headrace_core.transfer.transport import Reading, Source, TakerEnd, offer_name
from headrace_core.transfer.transports import choose
from headrace_core.transfer.values import (
    Admission,
    FirstToken,
    Order,
    Run,
    Shard,
    check_first,
    decode_admission,
    decode_first,
    decode_run,
    num_bytes,
)
from headrace_core.transfer.verify import check_compatible, to_its_end, yield_to_steps

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 5.0
MOST_PULLS = 4
"""Runs that are pulled at a time: with the bound on a run's bytes, what is in flight."""


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What a hand-off moved, and how long it took from the first token until all was verified.

    `wait_s` and `move_s` are sums over its runs, until they had their turn and from then until they were verified. Runs
    move beside each other, so a sum may be longer than the hand-off was. `num_hidden_bytes` were verified before the
    first token, while the prompt was computed; for `hidden_s` something was moved then. Where the taker had every
    page, nothing was moved: no transport did it.
    """

    transport: str
    num_bytes: int
    num_pages: int
    duration_s: float
    wait_s: float
    move_s: float
    num_hidden_bytes: int = 0
    hidden_s: float = 0.0


OnFirst = Callable[[Admission, FirstToken], None]
"""Told of the first token at once, while its cache is still on the way. May raise `HeadraceError`: the taker's."""


class Taker:
    """Takes sequences into one worker's memory."""

    def __init__(
        self,
        memory: PageMemory,
        *,
        fingerprint: str,
        layout: KvLayout,
        vocab_size: int,
        transports: Mapping[str, TakerEnd],
        timeout_s: float,
        connect: Connect = connect_to_any,
        most_pulls: int = MOST_PULLS,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        """Args: `timeout_s` is the longest that one run may take to move."""
        self.fingerprint = fingerprint
        self.layout = layout
        self.vocab_size = vocab_size
        self.transports = transports
        self.pulls = Pulls(most_pulls)
        # One thread, so that runs become usable in the order in which they came; and steps go before it.
        self.verifying = ThreadPoolExecutor(1, "verify", initializer=yield_to_steps)
        self.mover = Mover(memory, self.verifying, timeout_s, drain_timeout_s)
        self._control = Connections(connect=connect)

    async def take(
        self, order: Order, address: str, page_ids: Sequence[int], *, age: int, on_first: OnFirst
    ) -> TransferStats | None:
        """Have the sequence computed at `address` and its cache brought into `page_ids`.

        Nothing is written to the first of these pages, which `order.num_have_tokens` says are here. Returns None if the
        first token ended the sequence: nothing was moved. Cancel it at most once. When it ends in whatever way, no byte
        can land any more.

        Raises:
            TakeError: why it failed, and whose fault it is.
        """
        return await self._run(order, address, page_ids, age, on_first)

    async def take_prefix(self, order: Order, address: str, page_ids: Sequence[int], *, age: int) -> TransferStats:
        """Have what the prefix cache at `address` has of `order.spec.token_ids` brought into the first of `page_ids`.

        These are full pages; the first of them are here, as for `take`, and the last ones may not come. As for it, when
        it ends in whatever way, no byte can land any more.

        Raises:
            TakeError: as `take`.
        """
        moved = await self._run(order, address, page_ids, age, None)
        assert moved is not None, "no first token ends it"
        return moved

    async def _run(
        self, order: Order, address: str, page_ids: Sequence[int], age: int, on_first: OnFirst | None
    ) -> TransferStats | None:
        try:
            async with self._control.use(address) as channel:
                call = HoldCall(channel, order, address)
                return await _Take(self, call, order, address, page_ids, age, on_first).run()
        except PermissionDeniedError as error:  # that is the connection's: nothing was ordered
            raise TakeError(Side.CHANNEL, error) from error

    async def close(self) -> None:
        """Tear down every connection."""
        await self._control.close()
        for transport in self.transports.values():
            await transport.close()
        self.verifying.shutdown()


class _Take:
    """One attempt to take one sequence, or, without `on_first`, what the holder has of it."""

    def __init__(
        self,
        taker: Taker,
        call: HoldCall,
        order: Order,
        address: str,
        page_ids: Sequence[int],
        age: int,
        on_first: OnFirst | None,
    ) -> None:
        self._taker = taker
        self._call = call
        self._order = order
        self._address = address
        self._page_ids = page_ids
        self._num_wanted = len(page_ids) - order.num_have_pages
        """Pages that are to come, or at most so many as long as nothing is admitted."""
        self._age = age
        self._on_first = on_first
        self._over: asyncio.Future[TransferStats | None] = asyncio.get_running_loop().create_future()
        self._state = TakeState.OPENED
        self._admission: Admission | None = None
        self._first_s = 0.0
        self._verified_s = 0.0
        self._moving = MovingTime(monotonic)  # the loop's own clock may tell milliseconds alone, as uvloop's does
        self._num_verified_bytes = 0
        self._num_hidden_bytes = 0
        self._hidden_s = 0.0
        self._cells: set[tuple[int, int]] = set()
        """(layer, page) of every run so far."""
        self._runs: list[Run] = []
        self._choosing: list[tuple[Shard, asyncio.Task[Source]]] = []
        """Where the pages of each shard are read."""
        self._pulling: set[asyncio.Task[None]] = set()
        self._transport = ""
        self._wait_s = self._move_s = 0.0

    async def run(self) -> TransferStats | None:
        reading = asyncio.ensure_future(self._read())
        try:
            return await self._over
        finally:
            if self._state is not TakeState.TAKEN:
                self._state = TakeState.FAILED  # cancelled, if it was not that already
            self._call.cancel()
            tasks = [reading, *self._pulling, *(choosing for _, choosing in self._choosing)]
            for task in tasks:
                task.cancel()
            # Who cancels a taking that has failed by itself waits as well: bytes may land until this is over.
            await to_its_end(asyncio.ensure_future(asyncio.wait(tasks)))
            self._move(TakeEvent.DRAINED)

    async def _read(self) -> None:
        """Hear the holder out."""
        try:
            async for response in self._call.events():
                self._hear(response)
            self._fail(TakeError(Side.HOLDER, ProtocolError("PROTOCOL", "the holder ended the call halfway")))
        except (HeadraceError, TakeError) as error:
            self._fail(error)
        except Exception as error:
            log.error("taking a sequence failed", extra={"request_id": self._order.spec.request_id}, exc_info=error)
            self._fail(TakeError(Side.TAKER, HeadraceError("BUG", "internal error")))

    def _hear(self, response: pb.HoldResponse) -> None:
        match response.WhichOneof("event"):
            case "admitted":
                self._hear_admitted(decode_admission(response.admitted))
            case "run":
                self._hear_run(decode_run(response.run))
            case "last":
                self._hear_first(decode_first(response.last))
            case _:
                self._move(TakeEvent.CONFIRMED)
                self._finish()

    def _move(self, event: TakeEvent) -> None:
        state = TAKE_MOVES.get((self._state, event))
        if state is None:
            raise ProtocolError("PROTOCOL", f"the holder sent {event.value} when the taking was {self._state.value}")
        self._state = state

    def _hear_admitted(self, admission: Admission) -> None:
        self._move(TakeEvent.ADMITTED if self._on_first else TakeEvent.HELD)
        self._admission = admission
        ours = (self._taker.fingerprint, self._taker.layout)
        check_compatible(admission.fingerprint, admission.layout, ours=ours, who=self._address)
        for shard in admission.shards:
            reading = Reading(admission.lease_key, shard.incarnation, self._order.tokens_sha256)
            choosing = choose(shard.offers, self._taker.transports, endpoint=shard.endpoint, reading=reading)
            task = asyncio.ensure_future(choosing)
            task.add_done_callback(self._on_chosen)
            self._choosing.append((shard, task))
        if self._on_first is None:
            num_held = admission.num_cached_tokens // self._taker.layout.page_size
            _require(num_held <= len(self._page_ids), "has more of a prefix than was asked for")
            self._num_wanted = max(0, num_held - self._order.num_have_pages)
            self._first_s = monotonic()
            self._confirm_if_complete()

    def _hear_run(self, run: Run) -> None:
        self._move(TakeEvent.RUN)
        cells = {
            (layer, page)
            for layer in range(run.first_layer, run.first_layer + run.num_layers)
            for page in range(run.first_page, run.first_page + run.num_pages)
        }
        _require(run.first_page >= self._order.num_have_pages, "sealed a page that the taker has")
        num_pages = self._order.num_have_pages + self._num_wanted
        _require(run.first_page + run.num_pages <= num_pages, "sealed a page that the sequence has not")
        _require(run.first_layer + run.num_layers <= self._taker.layout.num_layers, "sealed a layer that there is not")
        _require(self._cells.isdisjoint(cells), "sealed a page twice")
        self._cells |= cells
        self._runs.append(run)
        for shard, choosing in self._choosing:
            part = run.layers(shard.first_layer, shard.num_layers)
            if part is not None:
                pulling = asyncio.ensure_future(self._pull(choosing, part))
                self._pulling.add(pulling)
                pulling.add_done_callback(self._on_pulled)

    def _hear_first(self, first: FirstToken) -> None:
        self._move(TakeEvent.END if first.finish else TakeEvent.LAST)
        check_first(first, self._order, self._taker.vocab_size)
        self._first_s = monotonic()
        self._num_hidden_bytes, self._hidden_s = self._num_verified_bytes, self._moving.seconds
        assert self._admission is not None, "the table says so"
        assert self._on_first is not None, "what is held has no such event in the table"
        try:
            self._on_first(self._admission, first)
        except HeadraceError as error:
            raise TakeError(Side.TAKER, error) from error
        if first.finish and not self._over.done():
            self._over.set_result(None)
        self._confirm_if_complete()

    async def _pull(self, choosing: asyncio.Task[Source], run: Run) -> None:
        source = await choosing
        name = offer_name(source.offer)
        page_ids = self._page_ids[run.first_page : run.first_page + run.num_pages]
        asked_s = monotonic()
        async with self._taker.pulls.turn(self._age), self._moving:
            begun_s = monotonic()
            await self._taker.mover.move(self._taker.transports[name], source, run, page_ids)
        self._transport = name
        self._verified_s = monotonic()
        self._wait_s += begun_s - asked_s
        self._move_s += self._verified_s - begun_s
        self._num_verified_bytes += num_bytes([run], self._taker.layout)

    def _on_chosen(self, choosing: asyncio.Task[Source]) -> None:
        """Fail at once, not only when there is something to pull."""
        if not choosing.cancelled() and choosing.exception() is not None:
            self._on_pulled(choosing)

    def _on_pulled(self, pulling: asyncio.Task[Any]) -> None:
        if pulling.cancelled():
            return
        error = pulling.exception()
        if error is None:
            self._pulling.discard(pulling)
            self._confirm_if_complete()
        elif isinstance(error, HeadraceError):
            is_holders = isinstance(error, HandoffLostError) and error.reason != "HOLDER_LOST"
            self._fail(TakeError(Side.HOLDER if is_holders else Side.CHANNEL, error))
        else:
            log.error("transfer failed", extra={"request_id": self._order.spec.request_id}, exc_info=error)
            self._fail(TakeError(Side.TAKER, HeadraceError("BUG", "internal error")))

    def _confirm_if_complete(self) -> None:
        num_cells = self._taker.layout.num_layers * self._num_wanted
        if self._state is TakeState.FINISHING and not self._pulling and len(self._cells) == num_cells:
            self._move(TakeEvent.VERIFIED)
            self._call.confirm()

    def _finish(self) -> None:
        if not self._over.done():
            moved = num_bytes(self._runs, self._taker.layout)
            duration_s = max(0.0, self._verified_s - self._first_s)
            stats = TransferStats(
                self._transport,
                moved,
                self._num_wanted,
                duration_s,
                self._wait_s,
                self._move_s,
                num_hidden_bytes=self._num_hidden_bytes,
                hidden_s=self._hidden_s,
            )
            self._over.set_result(stats)

    def _fail(self, error: HeadraceError | TakeError) -> None:
        if self._over.done():
            return
        self._state = TakeState.FAILED
        if not isinstance(error, TakeError):
            unfit = isinstance(error, LayoutMismatchError | TransferCorruptError)
            error = TakeError(Side.CHANNEL if unfit else Side.HOLDER, error)
        self._over.set_exception(error)


def _require(is_met: bool, problem: str) -> None:
    if not is_met:
        raise ProtocolError("PROTOCOL", f"the holder {problem}")
