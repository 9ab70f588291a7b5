"""What a fake worker does: which tokens it makes, and what goes wrong. See `fake_worker`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.v1 import types_pb2, worker_service_pb2

from headrace_core.errors import HeadraceError, InvalidRequestError, OverloadedError
from headrace_core.request import SamplingParams

NextToken = Callable[[Sequence[int], int], int]
"""From the tokens so far and how many of them are the prompt's, the next token."""


def scripted(token_ids: Sequence[int]) -> NextToken:
    """Return a function that gives these tokens in turn, for ever, whatever the prompt."""
    script = list(token_ids)

    def next_token(tokens: Sequence[int], num_prompt_tokens: int) -> int:
        return script[(len(tokens) - num_prompt_tokens) % len(script)]

    return next_token


def mixed(vocab_size: int) -> NextToken:
    """Return a function of every token so far: a continuation after a lost or repeated token differs."""

    def next_token(tokens: Sequence[int], num_prompt_tokens: int) -> int:
        mix = num_prompt_tokens
        for token_id in tokens:
            mix = (mix * 31 + token_id + 7) % 1_000_003
        return mix % vocab_size

    return next_token


def check_size(info: worker_service_pb2.GetInfoResponse, num_tokens: int, *, num_more: int) -> None:
    """Refuse what a real worker refuses: more tokens than its context, or with `num_more` its whole pool, holds.

    Raises:
        InvalidRequestError: PROMPT_TOO_LONG.
        OverloadedError: NO_FREE_PAGES.
    """
    if num_tokens >= info.max_context_tokens:
        raise InvalidRequestError("PROMPT_TOO_LONG", f"{num_tokens} tokens leave no room in the context")
    if num_tokens + num_more > info.num_pages * info.layout.page_size:
        raise OverloadedError("NO_FREE_PAGES", f"{num_tokens} tokens do not fit the whole pool")


@dataclass(slots=True)
class FakeFaults:
    """What goes wrong, each once, in order; and gates that calls wait at."""

    prefill: deque[HeadraceError] = field(default_factory=deque[HeadraceError])
    start: deque[HeadraceError] = field(default_factory=deque[HeadraceError])
    sequence: deque[tuple[int, HeadraceError]] = field(default_factory=deque[tuple[int, HeadraceError]])
    """(output tokens after which, error) for the sequences started next."""
    tickets: deque[Callable[[types_pb2.Handoff], None]] = field(
        default_factory=deque[Callable[[types_pb2.Handoff], None]]
    )
    """What is changed in the tickets of the Prefills answered next."""
    prefill_gate: asyncio.Event = field(default_factory=asyncio.Event)
    answer_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Closed: a Prefill that is done, its pages held, does not answer, and its cancellation frees nothing."""
    start_gate: asyncio.Event = field(default_factory=asyncio.Event)
    step_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Closed: no sequence makes a token, unless the test steps by hand."""
    ignores_cancel: bool = False
    """Outputs go on after Cancel, as late ones do."""

    def __post_init__(self) -> None:
        self.prefill_gate.set()
        self.answer_gate.set()
        self.start_gate.set()
        self.step_gate.set()


@dataclass(slots=True, eq=False)
class FakeSequence:
    """A running sequence."""

    session_id: str
    number: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    fault: tuple[int, HeadraceError] | None
    num_pages: int
    num_made: int = 0
