"""A sequence as the decode scheduler sees it. Pure; engine thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from headrace_core.batch.finish import FinishRule
from headrace_core.batch.prompt_progress import PromptProgress
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, SamplingMemo, SamplingRow
from headrace_core.kv.sequence_pages import SequencePages

from headrace_decode.speculation import Drafting


class State(Enum):
    """Where a sequence is; see the scheduler."""

    WAITING = "waiting"
    FETCHING = "fetching"
    TRANSFERRING = "transferring"
    RUNNING = "running"
    QUARANTINED = "quarantined"
    ASIDE = "aside"


MOVING = (State.FETCHING, State.TRANSFERRING)
"""Bytes may land in its pages."""


@dataclass(slots=True, eq=False)
class Scheduled:
    """`token_ids` are all known tokens; `output_ids` those after the prompt; both grow."""

    key: int
    group: int
    spec: SequenceSpec
    has_handoff: bool
    local_below: int
    token_ids: list[int]
    prompt_ids: list[int]
    output_ids: list[int]
    finish: FinishRule
    prompt: PromptProgress
    added_s: float
    num_cached_elsewhere: int = 0
    """Pages, as long as they were not asked for."""
    state: State = State.WAITING
    pages: SequencePages = field(default_factory=lambda: SequencePages(0))
    num_computed: int = 0
    num_cached: int = 0
    queue_s: float = 0.0
    is_started: bool = False
    memo: SamplingMemo = field(default_factory=SamplingMemo)
    drafting: Drafting = field(default_factory=Drafting)

    @staticmethod
    def of(spec: SequenceSpec, **values: Any) -> Scheduled:
        """Return a sequence that waits; `values` are the fields that `spec` does not say."""
        return Scheduled(
            spec=spec,
            token_ids=list(spec.token_ids),
            prompt_ids=spec.token_ids[: spec.num_prompt_tokens],
            output_ids=spec.token_ids[spec.num_prompt_tokens :],
            prompt=PromptProgress(spec),
            **values,
        )

    @property
    def num_left(self) -> int:
        """Tokens to compute."""
        return len(self.token_ids) - self.num_computed

    def chunk(self, end: int) -> Chunk:
        """Return its share of a step that computes its tokens up to `end`."""
        return Chunk(
            key=self.key,
            token_ids=self.token_ids[self.num_computed : end],
            start=self.num_computed,
            page_ids=self.pages.page_ids,
            is_sampled=end == len(self.token_ids),
            request_id=self.spec.request_id,
            lane=self.pages.lane,
            scoring=self.prompt.scoring(self.token_ids, self.num_computed, end),
        )

    def advance(self, chunk: Chunk, num_new: int, guess: Sequence[int]) -> None:
        """Take note that the chunk was computed, which gave `num_new` tokens; `token_ids` have them, not the guess."""
        self.drafting.told(guess, len(self.token_ids))
        self.num_computed += len(chunk.token_ids)
        if chunk.num_draft:
            # All that it gave but the last were drafted, and are computed; whatever else was drafted never was.
            self.num_computed = len(self.token_ids) - 1
            self.drafting.judge(chunk.num_draft, num_new - 1)

    def sampling(self, limits: ModelLimits) -> SamplingRow:
        """Return what its next token is chosen by."""
        return SamplingRow(
            params=self.spec.params,
            prompt_token_ids=self.prompt_ids,
            output_token_ids=self.output_ids,
            sample_index=self.spec.sample_index,
            position=len(self.token_ids),
            eos_token_ids=limits.eos_token_ids,
            memo=self.memo,
        )
