"""What makes a hand-off fail closed: the same model and layout before a byte moves, the same bytes after."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import xxhash

from headrace_core.errors import LayoutMismatchError, TransferCorruptError
from headrace_core.kv.layout import KvLayout
from headrace_core.transfer.ticket import Ticket
from headrace_core.transfer.transport import PageMemory

P = ParamSpec("P")
R = TypeVar("R")


async def run_to_its_end(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what `function` returns, run off the event loop; however often cancelled, return only once it is done.

    A thread cannot be stopped. One that still copied pages would write to what is by then another sequence's.
    """
    running = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    finally:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first one is on its way already
                await asyncio.wait([running])
        running.exception()  # seen


def seal_pages(memory: PageMemory, num_layers: int, page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Make computed pages ready to be sent; return their `checksums`. Not on the event loop."""
    memory.copy_to_host(page_ids)
    return checksums(memory, num_layers, page_ids)


def accept_pages(ticket: Ticket, memory: PageMemory, page_ids: Sequence[int]) -> None:
    """Check the bytes that arrived, then make them what is computed with. Not on the event loop.

    Raises:
        TransferCorruptError: CHECKSUM, naming layer and page.
    """
    check_bytes(ticket, memory, page_ids)
    memory.copy_from_host(page_ids)


def checksums(memory: PageMemory, num_layers: int, page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return xxh3-64 of each page's bytes, [num_layers][pages]. Any thread."""
    return tuple(
        tuple(xxhash.xxh3_64_intdigest(memory.page_bytes(layer, page_id)) for page_id in page_ids)
        for layer in range(num_layers)
    )


def check_compatible(ticket: Ticket, *, fingerprint: str, layout: KvLayout) -> None:
    """Check that the ticket's pages mean here what they mean to their holder.

    Raises:
        LayoutMismatchError: MODEL_MISMATCH, LAYOUT_MISMATCH.
    """
    if ticket.model_fingerprint != fingerprint:
        raise LayoutMismatchError(
            "MODEL_MISMATCH",
            f"{ticket.holder_endpoint} serves model {ticket.model_fingerprint[:12]}, this worker {fingerprint[:12]}: "
            "both need the same config, weights and --dtype",
        )
    if ticket.layout != layout:
        raise LayoutMismatchError(
            "LAYOUT_MISMATCH", f"{ticket.holder_endpoint} has pages of {ticket.layout}, this worker of {layout}"
        )


def check_bytes(ticket: Ticket, memory: PageMemory, page_ids: Sequence[int]) -> None:
    """Check the bytes that arrived against the ticket. Any thread.

    Raises:
        TransferCorruptError: CHECKSUM, naming layer and page.
    """
    arrived = checksums(memory, ticket.layout.num_layers, page_ids)
    for layer, (expected, got) in enumerate(zip(ticket.checksums, arrived, strict=True)):
        for index, (expected_sum, got_sum) in enumerate(zip(expected, got, strict=True)):
            if expected_sum != got_sum:
                raise TransferCorruptError(
                    "CHECKSUM",
                    f"page {index} of layer {layer} from {ticket.holder_endpoint} arrived with another checksum",
                )
