"""A holder of pages in a process of its own, to be killed: `python -m headrace_core.testing.lone_holder TRANSPORT`.

Ships with the product, for tests. Its pool is a `PlainMemory` of seed 1; it writes its offer to stdout, hexadecimal.
"""

from __future__ import annotations

import asyncio
import sys

import grpc.aio

from headrace_core.testing.handoff_parts import PlainMemory, StubHolder, holding
from headrace_core.transfer.memfd import Memfd
from headrace_core.transfer.transports import TRANSPORTS


async def _hold() -> None:
    shared = Memfd()
    pool = PlainMemory(seed=1, shared=shared)
    end = TRANSPORTS[sys.argv[1]].holder
    holder = end(holding(StubHolder(()), pool, frame_bytes=1, on_sent=lambda _: None, shared=shared))
    holder.serve(grpc.aio.server())
    offer = holder.offer()
    assert offer is not None, "it serves"
    sys.stdout.write(offer.SerializeToString().hex() + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_hold())
