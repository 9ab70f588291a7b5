"""What makes a hand-off fail closed: the same model and layout before a byte moves, the same bytes after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

import numpy as np
import xxhash

from headrace_core.errors import LayoutMismatchError, TransferCorruptError
from headrace_core.kv.layout import KvLayout
from headrace_core.transfer.memory import PageMemory
from headrace_core.transfer.transport import Read
from headrace_core.transfer.values import Run

_NICENESS = 10
_NICEST = 19

P = ParamSpec("P")
R = TypeVar("R")


async def run_to_its_end(executor: Executor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what `function` returns, run off the event loop; however often cancelled, return only once it is done.

    A thread cannot be stopped. One that still copied pages would write to what is by then another sequence's.
    """
    return await to_its_end(asyncio.wrap_future(executor.submit(function, *args, **kwargs)))


async def to_its_end(running: asyncio.Future[R]) -> R:
    """Return what `running` returns; however often cancelled, return only once it is done."""
    try:
        return await asyncio.shield(running)
    finally:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first one is on its way already
                await asyncio.wait([running])
        running.exception()  # seen


def yield_to_steps() -> None:
    """Let the engine's thread go before the calling one: on Linux a thread has a niceness of its own.

    It is by so much nicer than its process, which may be a nice one itself: without rights none may be less so again.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, _NICEST))


def accept_pages(
    run: Run, memory: PageMemory, page_ids: Sequence[int], *, endpoint: str, read: Read | None = None
) -> None:
    """Check the bytes of a run that arrived, then make them what is computed with. Not on the event loop.

    With `read` they are fetched here, page by page, each checked while it is in the processor's cache.

    Raises:
        TransferCorruptError: CHECKSUM, naming layer and page.
        HeadraceError: from `read`.
    """
    check_bytes(run, memory, page_ids, endpoint=endpoint, read=read)
    memory.copy_from_host(page_ids, range(run.first_layer, run.first_layer + run.num_layers))


def checksums(memory: PageMemory, layers: Sequence[int], page_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return xxh3-64 of each page's bytes, [layers][pages]. Any thread."""
    return tuple(
        tuple(xxhash.xxh3_64_intdigest(memory.page_bytes(layer, page_id)) for page_id in page_ids) for layer in layers
    )


def check_compatible(fingerprint: str, layout: KvLayout, *, ours: tuple[str, KvLayout], who: str) -> None:
    """Check that `who`'s pages mean here what they mean there; `ours` is this worker's fingerprint and layout.

    Raises:
        LayoutMismatchError: MODEL_MISMATCH, LAYOUT_MISMATCH.
    """
    if fingerprint != ours[0]:
        raise LayoutMismatchError(
            "MODEL_MISMATCH",
            f"{who} serves model {fingerprint[:12]}, this worker {ours[0][:12]}: "
            "both need the same config, weights and --dtype",
        )
    if layout != ours[1]:
        raise LayoutMismatchError(
            "LAYOUT_MISMATCH",
            f"pages of {who} are not laid out as this worker's: {layout.difference(ours[1])}; "
            "start both with the same options",
        )


def check_bytes(
    run: Run, memory: PageMemory, page_ids: Sequence[int], *, endpoint: str, read: Read | None = None
) -> None:
    """Check the bytes that arrived, or that `read` gives and are copied here first, against the run. Any thread.

    Raises:
        TransferCorruptError: CHECKSUM, naming layer and page.
        HeadraceError: from `read`.
    """
    layers = range(run.first_layer, run.first_layer + run.num_layers)
    for layer, expected in zip(layers, run.checksums, strict=True):
        for index, (page_id, expected_sum) in enumerate(zip(page_ids, expected, strict=True)):
            page = memory.page_bytes(layer, page_id)
            if read is not None:
                # Without the interpreter's lock: for steps, a copy between two bytecodes would be a pause.
                np.copyto(np.frombuffer(page, np.uint8), read(layer, index))
            # Of what is here now, also if somebody still writes there.
            if xxhash.xxh3_64_intdigest(page) != expected_sum:
                name = f"page {run.first_page + index} of layer {layer}"
                raise TransferCorruptError("CHECKSUM", f"{name} from {endpoint} arrived with another checksum")
