"""The way out of a decode worker that drains: a sample is placed elsewhere first, and runs on where it is until then.

    begin ── no other worker could take it ──► it ends where it is
      └── placed ──► its attempt there ends as moved ──► make: the next attempt takes the pages that are kept for it
Whatever ends the attempt before it is placed ends this as well. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time

from headrace_core.errors import HeadraceError

from headrace_router.fleet.session import Ended, Side
from headrace_router.requests.cached import Kept, cached_at
from headrace_router.requests.dispatch import Dispatcher, Placement
from headrace_router.requests.sample import Sample
from headrace_router.requests.sample_state import SampleState

log = logging.getLogger(__name__)


class Move:
    """That of one attempt, whose placement it owns. `close` must follow."""

    def __init__(self, dispatcher: Dispatcher, sample: Sample, placement: Placement) -> None:
        self._dispatcher = dispatcher
        self._sample = sample
        self._placement: Placement | None = placement
        self._placing: asyncio.Task[Placement] | None = None

    @property
    def has_pages(self) -> bool:
        """True if the sample runs, so that its worker has pages that another one can take."""
        return self._sample.state is SampleState.DECODING

    def begin(self) -> None:
        """Find a place elsewhere: the decode worker goes away."""
        sample, placement = self._sample, self._placement
        if placement is None or self._placing is not None or sample.is_over:
            return
        if self.has_pages:
            sample.cached = cached_at(placement.decode, sample.num_tokens)
        elif placement.prefill is not None:
            sample.prefer = placement.prefill.address
        self._placing = asyncio.ensure_future(self._dispatcher.place(sample))
        self._placing.add_done_callback(self._on_placed)

    def make(self) -> Placement:
        """Let the sample, whose attempt ended as moved, go on where it was placed; return that."""
        sample, placement, placing = self._sample, self._placement, self._placing
        assert placement is not None, "nobody took it yet"
        assert placing is not None, "it was placed"
        self._placing = None
        if self.has_pages:
            sample.cached = cached_at(placement.decode, sample.num_tokens)
            sample.kept = Kept(placement.decode, sample.number, sample.attempt, placement.release)
            self._placement = None
        sample.num_moves += 1
        sample.mark_failure(time.monotonic())
        sample.move(SampleState.QUEUED)
        placed = placing.result()
        data = {"request_id": sample.spec.request_id, "sample": sample.sample_index, "attempt": sample.attempt}
        log.info("moved", extra=data | {"worker": placement.decode.address, "to": placed.decode.address})
        return placed

    async def close(self) -> None:
        """Give back what is reserved and was not handed on."""
        placement, self._placement = self._placement, None
        placing, self._placing = self._placing, None
        if placement is not None:
            placement.release()
        if placing is None:
            return
        if placing.cancel():
            await asyncio.wait([placing])  # it leaves the queue before the sample can come back to it
        elif not placing.cancelled() and placing.exception() is None:
            placing.result().release()

    def _on_placed(self, placing: asyncio.Task[Placement]) -> None:
        if placing is not self._placing or placing.cancelled():
            return
        error = placing.exception()
        if error is None:
            self._sample.on_ended(Ended(Side.ROUTER, is_moved=True))
            return
        data = {"request_id": self._sample.spec.request_id, "problem": str(error)}
        if isinstance(error, HeadraceError):
            log.info("it ends where it is", extra=data)
        else:
            log.error("placing failed", extra=data, exc_info=error)
