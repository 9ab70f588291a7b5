"""Brings the beginning of a sequence from the decode worker that has it: it generated the turn before, or is leaving.

It saves computing, and is never the request's error: whatever goes wrong, it is computed. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from headrace_core.batch.scheduler import Scheduler
from headrace_core.batch.spec import SequenceSpec
from headrace_core.batch.step_book import FetchReady
from headrace_core.reasons import label
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.transfer.connections import Connect
from headrace_core.transfer.hold import TakeError
from headrace_core.transfer.taker import DRAIN_TIMEOUT_S, Taker, TransferStats
from headrace_core.transfer.transports import TRANSPORTS
from headrace_core.transfer.values import Order
from headrace_core.worker.host import WorkerHost
from headrace_core.worker.loading import LoadedModel
from headrace_core.worker.metrics import WorkerMetrics

log = logging.getLogger(__name__)


class FetchingScheduler(Scheduler[Any], Protocol):
    """What a scheduler needs that tells `FetchReady`."""

    def fetched(self, key: int, num_tokens: int, now: float) -> None:
        """Go on with a sequence whose first `num_tokens` were brought here and verified; 0: it was not to be."""
        ...

    def drained(self, key: int) -> None:
        """Nothing can land in the pages of a sequence any more."""
        ...


def model_taker(
    model: LoadedModel,
    transports: Sequence[str],
    *,
    connect: Connect,
    timeout_s: float,
    drain_timeout_s: float = DRAIN_TIMEOUT_S,
) -> Taker:
    """Return what takes pages into a model's pool by these transports; `timeout_s` is a run's."""
    return Taker(
        model.pages,
        fingerprint=model.fingerprint,
        layout=model.layout,
        vocab_size=model.limits.vocab_size,
        transports={name: TRANSPORTS[name].taker(model.pages, connect) for name in transports},
        connect=connect,
        timeout_s=timeout_s,
        drain_timeout_s=drain_timeout_s,
    )


class PrefixFetcher:
    """See the module; a taker as decode workers are (`transfer.taker`)."""

    def __init__(
        self,
        host: WorkerHost[Any],
        metrics: WorkerMetrics,
        *,
        on_taken: Callable[[int, TransferStats], None] = lambda key, moved: None,
    ) -> None:
        """Args: `host` has a `FetchingScheduler`; `on_taken` hears what came of which sequence, if anything did."""
        self._host = host
        self._metrics = metrics
        self._on_taken = on_taken
        self._taker: Taker | None = None
        self._timeout_s = 0.0
        self._fetching: dict[int, asyncio.Task[TransferStats]] = {}

    def start(self, taker: Taker, *, timeout_s: float) -> None:
        """Be ready to fetch; that may take `timeout_s`."""
        self._timeout_s = timeout_s
        self._taker = taker

    def fetch(self, ready: FetchReady, order: Order) -> None:
        """Bring what is cached elsewhere of an order into its pages, and tell the scheduler how much came."""

        def on_done(fetching: asyncio.Task[TransferStats]) -> None:
            self._on_done(ready, order, fetching)

        fetching = self._fetching[ready.key] = asyncio.ensure_future(self._take(ready, order))
        fetching.add_done_callback(on_done)

    def cancel(self, key: int) -> None:
        """End the fetch of a sequence that was freed; its pages are the scheduler's when nothing can land any more."""
        fetching = self._fetching.get(key)
        if fetching is None:
            # It may have pages of which the loop has yet to hear; no fetch into them begins any more.
            self._host.engine.submit(lambda scheduler: scheduler.drained(key))
        elif not fetching.cancelling():
            fetching.cancel()

    async def close(self) -> None:
        """Wait for the fetches, which are cancelled by then."""
        if self._fetching:
            await asyncio.wait(self._fetching.values())

    def _on_done(self, ready: FetchReady, order: Order, fetching: asyncio.Task[TransferStats]) -> None:
        """Let the scheduler go on. A callback, since a task that is cancelled at once runs nothing of its own."""
        key, page_size, now = ready.key, order.layout.page_size, time.monotonic()
        del self._fetching[key]
        num_tokens = 0
        error = None if fetching.cancelled() else fetching.exception()
        if not fetching.cancelled() and error is None:
            moved = fetching.result()
            if moved.num_pages:
                num_tokens = ready.num_have_tokens + moved.num_pages * page_size
                self._metrics.transfer_bytes.labels(moved.transport, "received").inc(moved.num_bytes)
                self._metrics.prefix_fetched_tokens.inc(moved.num_pages * page_size)
                self._on_taken(key, moved)
        elif isinstance(error, TakeError):
            reason = error.error.reason
            self._metrics.handoff_failures.labels(label(reason)).inc()
            data = {"request_id": order.spec.request_id, "reason": reason, "problem": str(error.error)}
            log.warning("a cached prefix was not to be had", extra=data)
        elif error is not None:
            log.error("fetching a prefix failed", extra={"request_id": order.spec.request_id}, exc_info=error)
        if not fetching.cancelled():
            self._metrics.prefix_fetches.labels("taken" if num_tokens else "failed").inc()
        self._host.engine.submit(lambda scheduler: scheduler.fetched(key, num_tokens, now))
        self._host.engine.submit(lambda scheduler: scheduler.drained(key))

    async def _take(self, ready: FetchReady, order: Order) -> TransferStats:
        assert self._taker is not None, "ready"
        assert order.cached is not None, "it is fetched from somewhere"
        spec = order.spec
        token_ids = spec.token_ids[: len(ready.page_ids) * order.layout.page_size]
        wanted = Order(
            owner=order.owner,
            spec=SequenceSpec(
                spec.request_id, spec.attempt, spec.sample_index, token_ids, len(token_ids), SamplingParams()
            ),
            timeout_s=min(order.timeout_s, self._timeout_s),
            tokens_sha256=hash_tokens(token_ids),
            fingerprint=order.fingerprint,
            layout=order.layout,
            num_have_tokens=ready.num_have_tokens,
            holder_incarnation=order.cached.incarnation,
            traceparent=order.traceparent,
        )
        return await self._taker.take_prefix(wanted, order.cached.address, ready.page_ids, age=ready.key)
