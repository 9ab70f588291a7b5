"""What the decode scheduler tells of. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_core.batch.step_book import Failed, FetchReady
from headrace_core.request import FinishReason, PromptLogprobs, SampledToken

from headrace_decode.held_prefixes import PrefixHeld


@dataclass(frozen=True, slots=True)
class PagesReady:
    """A sequence that is computed elsewhere has destination pages; have its bytes brought into them.

    The first of `page_ids` are the prefix cache's, which have `num_have_tokens` already and are not to be written to.
    """

    key: int
    page_ids: tuple[int, ...]
    num_have_tokens: int
    queue_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence joined the running batch for the first time."""

    key: int
    queue_s: float
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """A sequence's next token; with `finish`, its last."""

    key: int
    token: SampledToken
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of a sequence's prompt, which go on from those of the event before."""

    key: int
    logprobs: PromptLogprobs


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence gave its pages back and waits to be computed again."""

    key: int


SequenceEvent = FetchReady | PagesReady | Started | Scored | Output | Failed | Preempted
DecodeEvent = SequenceEvent | PrefixHeld
