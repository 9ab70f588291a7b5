"""One run, from the holder's pages into ours: moved, drained, verified. Whatever the transport. Event loop only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Source, TakerEnd, Transfer
from headrace_core.transfer.values import Run
from headrace_core.transfer.verify import accept_pages, run_to_its_end, to_its_end

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mover:
    """Moves runs into `memory`; `verifying` runs what must not be on the event loop.

    `timeout_s` is the longest that one run may take to move, `drain_timeout_s` how long a transport may take to say
    that no byte can land any more before it loses its connection.
    """

    memory: PageMemory
    verifying: Executor
    timeout_s: float
    drain_timeout_s: float

    async def move(self, transport: TakerEnd, source: Source, run: Run, page_ids: Sequence[int]) -> None:
        """Have a run in `page_ids`, verified and computed with. When this ends, in whatever way, no byte can land.

        Raises:
            HeadraceError: it is not there; the pages' bytes are undefined.
        """
        transfer = transport.pull(source, run, page_ids, timeout_s=self.timeout_s)
        memory, endpoint = self.memory, source.endpoint
        read = None
        try:
            read = await transfer.wait()
            if read is not None:
                await run_to_its_end(self.verifying, accept_pages, run, memory, page_ids, endpoint=endpoint, read=read)
        finally:
            if not transfer.is_drained:
                transfer.cancel()
                # However the sequence ends meanwhile: its pages may have another owner when this is over.
                await to_its_end(asyncio.ensure_future(self._drain(source, transport, transfer)))
        if read is None:
            # Off the loop: hashing a long prompt's pages takes tens of milliseconds.
            await run_to_its_end(self.verifying, accept_pages, run, memory, page_ids, endpoint=endpoint)

    async def _drain(self, source: Source, transport: TakerEnd, transfer: Transfer) -> None:
        """Return when no byte of `transfer` can land; a transport that can't say so in time loses its connection."""
        try:
            async with asyncio.timeout(self.drain_timeout_s):
                await transfer.drained()
        except TimeoutError:
            log.warning("transfer did not drain, disconnecting", extra={"holder": source.endpoint})
            await transport.disconnect(source.endpoint)
            await transfer.drained()
