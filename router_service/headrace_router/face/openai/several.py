"""The requests of one body's prompts, as one: their pieces by turns; choices are counted on from prompt to prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from headrace_core.errors import HeadraceError

from headrace_router.requests.piece import Piece
from headrace_router.requests.running import RunningRequest
from headrace_router.requests.sample import OnText


class Pieces(Protocol):
    """Where an answer comes from; see `RunningRequest`."""

    @property
    def is_told(self) -> bool:
        """True when the client has been told everything."""
        ...

    def take_all(self) -> list[Piece]:
        """Return every piece that there is now; raises what ended the request."""
        ...

    def listen(self, on_news: Callable[[], None], on_text: OnText | None = None) -> None:
        """Call `on_news` now and whenever `take_all` has something, or raises; see `RunningRequest`."""
        ...

    async def settle(self) -> None:
        """Wait until nothing runs any more, the client having been told everything."""
        ...

    def fail(self, error: HeadraceError) -> None:
        """End with `error`."""
        ...


class Several:
    """Several requests. What ends one of them ends the answer; whoever opened them closes them."""

    def __init__(self, requests: Sequence[RunningRequest], num_samples: int) -> None:
        """Args: `num_samples` of each request."""
        self._requests = requests
        self._num_samples = num_samples

    @property
    def is_told(self) -> bool:
        """See `Pieces`."""
        return all(request.is_told for request in self._requests)

    def take_all(self) -> list[Piece]:
        """See `Pieces`."""
        pieces: list[Piece] = []
        for index, request in enumerate(self._requests):
            for piece in request.take_all():
                pieces.append(replace(piece, sample_index=index * self._num_samples + piece.sample_index))
            if pieces and pieces[-1].prompt_logprobs is not None:
                break  # it is long, and what is left is asked for again
        return pieces

    def listen(self, on_news: Callable[[], None], on_text: OnText | None = None) -> None:
        """See `Pieces`; here everything is a piece."""
        del on_text
        for request in self._requests:
            request.listen(on_news)

    async def settle(self) -> None:
        """See `Pieces`."""
        await asyncio.gather(*(request.settle() for request in self._requests))

    def fail(self, error: HeadraceError) -> None:
        """See `Pieces`."""
        for request in self._requests:
            request.fail(error)
