"""What a fake worker does: which tokens it makes, and what goes wrong. See `fake_worker`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from headrace.v1 import decode_service_pb2, worker_service_pb2

from headrace_core.batch.spec import SequenceSpec
from headrace_core.errors import HeadraceError, InvalidRequestError, OverloadedError
from headrace_core.request import DEFAULT_MAX_TOKENS, FinishReason, PromptLogprobs, SamplingParams
from headrace_core.transfer.hold import TakeError
from headrace_core.wire import decode_sampling

NextToken = Callable[[Sequence[int], int], int]
"""From the tokens so far and how many of them are the prompt's, the next token."""

FAKE_PART = 5
"""Of a prompt's log-probabilities, in an entry."""


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


def finish_of(
    info: worker_service_pb2.GetInfoResponse, tokens: Sequence[int], num_prompt_tokens: int, params: SamplingParams
) -> FinishReason | None:
    """Return why a sequence ends with its last token, as a real worker would say; None if it goes on."""
    eos_ids = () if params.ignore_eos else tuple(info.eos_token_ids)
    if tokens[-1] in (*eos_ids, *params.stop_token_ids):
        return FinishReason.STOP
    most = params.max_tokens or DEFAULT_MAX_TOKENS
    if len(tokens) - num_prompt_tokens >= most or len(tokens) >= info.max_context_tokens:
        return FinishReason.LENGTH
    return None


@dataclass(slots=True)
class FakeFaults:
    """What goes wrong, each once, in order; and gates that work waits at."""

    prefill: deque[HeadraceError] = field(default_factory=deque[HeadraceError])
    """What Hold calls end with, in place of a first token."""
    join: deque[HeadraceError | TakeError] = field(default_factory=deque[HeadraceError | TakeError])
    """What sequences end with, in place of joining; a `HeadraceError` is the decode worker's own."""
    scored: deque[HeadraceError] = field(default_factory=deque[HeadraceError])
    """What sequences end with behind the first of a prompt's log-probabilities."""
    sequence: deque[tuple[int, HeadraceError]] = field(default_factory=deque[tuple[int, HeadraceError]])
    """(output tokens after which, error) for the sequences started next."""
    prefilled: deque[Callable[[decode_service_pb2.Prefilled], None]] = field(
        default_factory=deque[Callable[[decode_service_pb2.Prefilled], None]]
    )
    """What is changed in the first tokens told next."""
    prefill_gate: asyncio.Event = field(default_factory=asyncio.Event)
    answer_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Closed: a prefill that is done, its pages held, does not say so."""
    join_gate: asyncio.Event = field(default_factory=asyncio.Event)
    step_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Closed: no sequence makes a token, unless the test steps by hand."""
    load_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Closed: no load report is made."""
    ignores_cancel: bool = False
    """Sequences go on after a cancel, as late entries do."""

    def __post_init__(self) -> None:
        for gate in (self.prefill_gate, self.answer_gate, self.join_gate, self.step_gate, self.load_gate):
            gate.set()


@dataclass(slots=True, eq=False)
class FakeSequence:
    """A running sequence."""

    router_id: int
    number: int
    attempt: int
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    fault: tuple[int, HeadraceError] | None
    num_made: int = 0


def spec_of(message: decode_service_pb2.StartSequence) -> SequenceSpec:
    """Return what a decode worker is to compute."""
    return SequenceSpec(
        request_id=message.request_id,
        attempt=message.attempt,
        sample_index=message.sample_index,
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        params=decode_sampling(message.sampling),
        num_prompt_logprobs=message.num_prompt_logprobs,
    )


def prompt_logprobs(spec: SequenceSpec, faults: FakeFaults) -> Iterator[PromptLogprobs]:
    """Yield what a fake worker says of a prompt, by its tokens and their places, `FAKE_PART` of them at a time.

    Raises:
        HeadraceError: the next of `faults.scored`, behind the first part.
    """
    num_top = spec.params.prompt_logprobs or 0
    first = spec.num_prompt_logprobs + 1
    places = range(first, spec.num_prompt_tokens)
    logprobs = PromptLogprobs(
        first,
        [-0.5 - place % 7 for place in places],
        [1 + place % 3 for place in places],
        num_top,
        [(spec.token_ids[place] + rank) % 256 for place in places for rank in range(num_top)],
        [-0.25 - rank for _ in places for rank in range(num_top)],
    )
    for part in logprobs.parts(FAKE_PART):
        yield part
        if faults.scored:
            raise faults.scored.popleft()
