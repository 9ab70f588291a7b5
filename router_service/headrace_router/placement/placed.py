"""Who starts where, and what is promised of its workers from then on: made, and given back step by step. Pure."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from headrace_router.placement.capacity import Waiting, WorkerView
from headrace_router.placement.fair_queue import HasTurn
from headrace_router.placement.promises import Grows, Promise, Promises


class Entry(HasTurn, Grows, Protocol):
    """What queues."""

    waiting: Waiting
    """What placement knows of it; the book counts in it by how many it was overtaken."""


class Placeable(Protocol):
    """A worker that is connected."""

    promises: Promises

    def view(self, now_s: float) -> WorkerView:
        """Return it as policies see it now."""
        ...


E = TypeVar("E", bound=Entry)
W = TypeVar("W", bound=Placeable)


class Placed(Generic[E, W]):
    """An entry that starts, and what its workers were promised to have room for: less and less, as it goes on."""

    __slots__ = ("_on_decode", "_on_prefill", "decode", "entry", "prefill")

    def __init__(self, entry: E, prefill: W | None, decode: W) -> None:
        """Promise it; `prefill` None: `decode` computes the prompt as well."""
        self.entry = entry
        self.prefill = prefill
        self.decode = decode
        self._on_prefill: Promise | None = None
        if prefill is not None:
            self._on_prefill = prefill.promises.make(entry, entry.waiting, prefills=True, decodes=False)
        self._on_decode = decode.promises.make(entry, entry.waiting, prefills=prefill is None, decodes=True)

    @property
    def num_prefill_tokens(self) -> int:
        """Of its prompt, that the prefill worker has still to compute."""
        return self._on_prefill.num_tokens if self._on_prefill is not None else 0

    def on_prefilled(self) -> None:
        """The prefill worker has computed the prompt; its pages are held there, and are the sequence's at both."""
        if self.prefill is not None and self._on_prefill is not None:
            self.prefill.promises.compute(self._on_prefill)
            self.prefill.promises.start(self._on_prefill)
            self.decode.promises.start(self._on_decode)

    def on_joined(self) -> None:
        """The decode worker runs it, be it that it computes the prompt itself; the prefill worker is free of it."""
        self.decode.promises.start(self._on_decode)
        if self.prefill is not None and self._on_prefill is not None:
            self.prefill.promises.end(self._on_prefill)

    def on_stepped(self) -> None:
        """The decode worker computed a token, so that the prompt is computed, whoever did it."""
        self.decode.promises.compute(self._on_decode)

    def release(self) -> None:
        """Give everything back; idempotent."""
        if self.prefill is not None and self._on_prefill is not None:
            self.prefill.promises.end(self._on_prefill)
        self.decode.promises.end(self._on_decode)
