"""The taking side of a hand-off. Event loop only.

    CHECKED ──pages free──► PULLING ──every byte here──► VERIFYING ──checksums fit──► TAKEN ──► RELEASED
       └──────────────────────┴────lost, corrupt, cancelled──┴──► DRAINED (no byte can land any more)

The lease is renewed all along, until TAKEN. A transfer's DONE proves nothing; only VERIFYING makes the pages ours.
Whoever calls `take` may reuse the pages when it returns or raises: it never does either before DRAINED.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from headrace_core.batch.spec import SequenceSpec
from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError, TransferCorruptError
from headrace_core.kv.layout import KvLayout
from headrace_core.request import hash_tokens
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transport import PageMemory, Transfer, Transport
from headrace_core.transfer.transports import choose_transport
from headrace_core.transfer.verify import accept_pages, check_compatible, run_to_its_end

log = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_RELEASE_TIMEOUT_S = 2.0
DRAIN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What a hand-off moved, and how long moving and verifying took."""

    transport: str
    num_bytes: int
    num_pages: int
    duration_s: float


def check_ticket(ticket: Ticket, spec: SequenceSpec) -> None:
    """Check that a ticket is for this sequence and this attempt, and that its pages hold the sequence's tokens.

    What passes is filed in the prefix cache under `spec.token_ids`, and later requests compute on it.

    Raises:
        HandoffLostError: STALE_ATTEMPT, it is of another attempt.
        InvalidRequestError: BAD_HANDOFF, it is for something else.
        TransferCorruptError: TOKENS_MISMATCH, its pages hold other tokens.
    """
    if ticket.request_id != spec.request_id or ticket.sample_index != spec.sample_index:
        raise InvalidRequestError("BAD_HANDOFF", "the ticket is for another request or sample")
    if ticket.attempt != spec.attempt:
        raise HandoffLostError("STALE_ATTEMPT", f"the ticket is of attempt {ticket.attempt}, not {spec.attempt}")
    if ticket.num_tokens != len(spec.token_ids):
        raise InvalidRequestError(
            "BAD_HANDOFF", f"the ticket covers {ticket.num_tokens} tokens, the sequence has {len(spec.token_ids)}"
        )
    if ticket.seed != spec.params.seed:
        raise InvalidRequestError("BAD_HANDOFF", "the ticket's seed is not the sequence's")
    if ticket.tokens_sha256 != hash_tokens(spec.token_ids):
        raise TransferCorruptError(
            "TOKENS_MISMATCH", f"{ticket.holder_endpoint} computed other tokens than the sequence's; prefill again"
        )


class Receiver:
    """Takes pages into one worker's memory."""

    def __init__(
        self,
        memory: PageMemory,
        *,
        fingerprint: str,
        layout: KvLayout,
        transports: Mapping[str, Transport],
        timeout_s: float,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self._memory = memory
        self._fingerprint = fingerprint
        self._layout = layout
        self._transports = transports
        self._timeout_s = timeout_s
        self._drain_timeout_s = drain_timeout_s

    def choose(self, ticket: Ticket) -> str:
        """Return the transport to take `ticket` by; nothing has moved yet.

        Raises:
            LayoutMismatchError: MODEL_MISMATCH, LAYOUT_MISMATCH, NO_COMMON_TRANSPORT.
        """
        check_compatible(ticket, fingerprint=self._fingerprint, layout=self._layout)
        return choose_transport(ticket, frozenset(self._transports))

    async def take(
        self, ticket: Ticket, name: str, pages: asyncio.Future[Sequence[int]], on_taken: Callable[[], None]
    ) -> TransferStats:
        """Wait for `pages`, move the ticket's bytes into them, verify, call `on_taken`, release the lease.

        Cancel it at most once. When it ends in whatever way, no byte can land any more.

        Raises:
            HandoffLostError: LEASE_EXPIRED, WORKER_RESTARTED, STALE_ATTEMPT, STALE_PAGE, HOLDER_LOST.
            TransferCorruptError: TOKENS_MISMATCH, CHECKSUM, SHORT_READ.
        """
        transport = self._transports[name]
        lease = asyncio.ensure_future(_keep_lease(ticket, transport))
        moving = asyncio.ensure_future(self._move(ticket, transport, name, pages))
        try:
            await asyncio.wait([lease, moving], return_when=asyncio.FIRST_COMPLETED)
            if not moving.done():
                lease.result()  # raises: a lease is kept until it is lost
            stats = moving.result()
        finally:
            lease.cancel()
            moving.cancel()
            await asyncio.wait([lease, moving])
            for task in (lease, moving):
                if not task.cancelled():
                    task.exception()  # seen
        on_taken()
        await _release(ticket, transport)
        return stats

    async def close(self) -> None:
        """Tear down every connection."""
        for transport in self._transports.values():
            await transport.close()

    async def _move(
        self, ticket: Ticket, transport: Transport, name: str, pages: asyncio.Future[Sequence[int]]
    ) -> TransferStats:
        loop = asyncio.get_running_loop()
        page_ids = await pages
        started = loop.time()
        transfer = transport.pull(ticket, page_ids, timeout_s=self._timeout_s)
        try:
            await transfer.wait()
        finally:
            transfer.cancel()
            await self._drain(ticket, transport, transfer)
        # Off the loop: hashing a long prompt's pages takes tens of milliseconds.
        await run_to_its_end(accept_pages, ticket, self._memory, page_ids)
        return TransferStats(name, ticket.num_bytes, len(page_ids), loop.time() - started)

    async def _drain(self, ticket: Ticket, transport: Transport, transfer: Transfer) -> None:
        """Return when no byte of `transfer` can land; a transport that can't say so in time loses its connection."""
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await transfer.drained()
        except TimeoutError:
            log.warning("transfer did not drain, disconnecting", extra={"holder": ticket.holder_endpoint})
            await transport.disconnect(ticket.holder_endpoint)
            await transfer.drained()


async def _keep_lease(ticket: Ticket, transport: Transport) -> NoReturn:
    """Renew until cancelled.

    Raises:
        HandoffLostError: the holder says so, or could not be asked for a whole lease's duration.
    """
    loop = asyncio.get_running_loop()
    duration_s = ticket.lease_s
    alive_until = loop.time() + duration_s
    while True:
        await asyncio.sleep(duration_s / _RENEWALS_PER_LEASE)
        asked = loop.time()
        try:
            duration_s = await transport.renew(ticket, timeout_s=duration_s / _RENEWALS_PER_LEASE)
            alive_until = asked + duration_s
        except HandoffLostError:
            raise
        except HeadraceError as error:
            if loop.time() >= alive_until:
                raise HandoffLostError(
                    "HOLDER_LOST", f"{ticket.holder_endpoint} could not be asked to keep the lease: {error}"
                ) from error


async def _release(ticket: Ticket, transport: Transport) -> None:
    """Tell the holder; if it can't be told, its lease expires by itself."""
    try:
        await transport.release(ticket, timeout_s=_RELEASE_TIMEOUT_S)
    except HeadraceError as error:
        log.warning("lease not released", extra={"request_id": ticket.request_id, "reason": error.reason})
