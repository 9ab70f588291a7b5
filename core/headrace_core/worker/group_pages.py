"""The pool of a group as transfers see it, at rank 0: whole pages, whatever part of them each rank has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from headrace_core.batch.step import Mark
from headrace_core.engine.leader import Leader
from headrace_core.errors import UnavailableError
from headrace_core.transfer.memory import PageMemory

OnEngine = Callable[[Callable[[], None]], None]
"""Has a function run on the engine thread between two steps, in the order of the calls."""


class GroupPages:
    """See the module, and `transfer.memory.PageMemory`.

    `memory` has the pages that are moved, of all lanes. Where every rank has all of each page of its lane it is the
    host's side of rank 0's own cache. Else it is memory beside that. What is sent and is not rank 0's `own` is put
    together there from the parts of those that have it, between two steps.
    """

    def __init__(self, memory: PageMemory, *, own: range) -> None:
        self._memory = memory
        self._own = own
        self._led: tuple[Leader, OnEngine] | None = None
        self._asked: set[Future[None]] = set()
        self._is_over = False

    def lead(self, leader: Leader, on_engine: OnEngine) -> None:
        """Be ready for pages to move."""
        self._led = leader, on_engine

    def page_bytes(self, layer: int, page_id: int) -> memoryview:
        """See `PageMemory`."""
        return self._memory.page_bytes(layer, page_id)

    def host_layers(self) -> Sequence[memoryview]:
        """See `PageMemory`."""
        return self._memory.host_layers()

    def copy_from_host(self, page_ids: Sequence[int], layers: range) -> None:
        """See `PageMemory`: every rank has them before the next step, though not when this returns.

        "Have in these pages what is here" is right whatever becomes of their sequence, so nobody takes it back.
        """
        if page_ids:
            self._memory.copy_from_host([page_id for page_id in page_ids if page_id in self._own], layers)
            leader, on_engine = self._leading
            on_engine(lambda: leader.tell_pages(self._memory, page_ids, layers))

    def copy_to_host(self, page_ids: Sequence[int], layers: range, behind: Mark | None = None) -> None:
        """See `PageMemory`.

        Raises:
            UnavailableError: RANK_LOST, the group is over.
        """
        own = [page_id for page_id in page_ids if page_id in self._own]
        others = [page_id for page_id in page_ids if page_id not in self._own]
        if own:
            self._memory.copy_to_host(own, layers, behind)
        if not others:
            return
        leader, on_engine = self._leading
        done: Future[None] = Future()
        self._asked.add(done)

        def ask() -> None:
            leader.ask_pages(self._memory, others, layers)
            with suppress(InvalidStateError):
                done.set_result(None)

        on_engine(ask)
        if self._is_over:
            self.close()
        try:
            done.result()
        finally:
            self._asked.discard(done)

    def close(self) -> None:
        """Let nobody wait for an engine that runs no more."""
        self._is_over = True
        for done in list(self._asked):
            with suppress(InvalidStateError):
                done.set_exception(UnavailableError("RANK_LOST", "the group of this worker's ranks is over"))

    @property
    def _leading(self) -> tuple[Leader, OnEngine]:
        assert self._led is not None, "pages move once there is an engine"
        return self._led
