"""Which rows of a decode step get a draft, and how long a one. Pure; engine thread only.

A draft of k tokens makes k rows more, and whichever of them were right are tokens more. That pays while a row more
costs next to nothing: while a step takes as long as reading the weights takes, however many rows read them together. So
no step gets drafts that computes prompts, or has `max_rows` already; of the rows left to it the oldest sequences have
theirs first. A sequence's drafts are twice as long after one that was right to its end, and else as long as what was
right of the last; one whose drafts are mostly wrong all the same goes without for a while, each time for longer.

A draft never takes a page that a row of the next steps may need, and never has a token that would end its sequence or
stand past its end: so it changes how many steps a sequence takes, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from headrace_core.batch.finish import FinishRule
from headrace_core.batch.step import Chunk
from headrace_core.config import DecodeSettings
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages

from headrace_decode.prompt_lookup import PromptLookup

_DEFAULT_TOKENS = {"lookup": 4, "mtp": 1}
_MOST_ROWS = {"lookup": {"cpu": 8, "cuda": 64}, "mtp": {"cpu": 2, "cuda": 64}}
"""A step's rows, after which another one costs what it costs alone: on a CPU as measured (docs/benchmarks.md), less
where a module takes its part of each step, too; on a GPU far below where its arithmetic takes as long as its memory,
some hundred rows."""
_MOST_TOKENS = 99
"""Of a draft, by the settings."""
_JUDGED_TOKENS = 32
"""Drafted tokens after which a sequence's drafts are judged."""
_LEAST_SHARE = 0.4
"""A draft pays if so many of its tokens are right: each takes a row, which is up to a third of a step on a CPU, where
rows have experts of their own (docs/benchmarks.md)."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 512
"""Steps that a sequence goes without."""


class Guesser(Protocol):
    """Who makes one sequence's drafts."""

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return what may follow `token_ids`, at most `count` tokens."""
        ...


@dataclass(slots=True)
class TokensToCome:
    """`Guesser` of what the model's MTP module said with the last token; nothing if it said it behind another one."""

    token_ids: Sequence[int] = ()
    num_known: int = 0

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """See `Guesser`."""
        return list(self.token_ids[:count]) if len(token_ids) == self.num_known else []


@dataclass(slots=True)
class Drafting:
    """One sequence's drafts: how they did of late."""

    guesser: Guesser = field(default_factory=PromptLookup)
    length: int = 1
    num_drafted: int = 0
    num_right: int = 0
    pause: int = _SHORTEST_PAUSE
    num_steps_off: int = 0

    def guess(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return a draft of at most `count` tokens; none while it goes without."""
        if self.num_steps_off:
            self.num_steps_off -= 1
            return []
        return self.guesser.guess(token_ids, min(self.length, count))

    def num_wanted(self, count: int) -> int:
        """Return how many tokens of its next draft, of `count` at most, the step at hand is to guess."""
        return 0 if self.num_steps_off else min(2 * self.length, count)

    def told(self, guess: Sequence[int], num_known: int) -> None:
        """Take note of what a step guessed, if it did: what follows the first `num_known` tokens."""
        if guess:
            self.guesser = TokensToCome(guess, num_known)

    def judge(self, num_drafted: int, num_right: int) -> None:
        """Take note of what became of a draft."""
        self.length = min(2 * self.length, _MOST_TOKENS) if num_right == num_drafted else max(num_right, 1)
        self.num_drafted += num_drafted
        self.num_right += num_right
        if self.num_drafted < _JUDGED_TOKENS:
            return
        if self.num_right < _LEAST_SHARE * self.num_drafted:
            self.num_steps_off, self.pause = self.pause, min(2 * self.pause, _LONGEST_PAUSE)
        else:
            self.pause = _SHORTEST_PAUSE
        self.num_drafted = self.num_right = 0


class Drafted(Protocol):
    """A sequence that may have drafts."""

    token_ids: list[int]
    output_ids: list[int]
    pages: SequencePages
    finish: FinishRule
    drafting: Drafting


@dataclass(frozen=True, slots=True)
class Speculation:
    """Drafts of at most `num_tokens`, in steps of at most `max_rows` rows; 0 tokens: none.

    `method`: by what followed before (`PromptLookup`), or by the model's MTP module.
    """

    num_tokens: int = 0
    max_rows: int = 0
    method: Literal["lookup", "mtp"] = "lookup"

    @property
    def is_mtp(self) -> bool:
        """Whether the model's module guesses."""
        return self.method == "mtp"

    def runs_module(self, chunks: Sequence[Chunk]) -> bool:
        """Return whether a step of these chunks, as `with_drafts` made them, runs the module.

        It does for prompts, and where it is to guess. Other tokens have no rows of it then: guesses behind them are a
        little worse (docs/benchmarks.md), and steps whose drafts were turned down cost what they cost without it.
        """
        return self.is_mtp and any(
            chunk.num_wanted or not chunk.is_sampled or len(chunk.token_ids) > 1 + chunk.num_draft for chunk in chunks
        )

    def drafting(self) -> Drafting:
        """Return a new sequence's."""
        return Drafting(TokensToCome()) if self.is_mtp else Drafting()

    @staticmethod
    def of(settings: DecodeSettings) -> Speculation:
        """Return what `--speculate` asks for. Recorded steps have no more rows than sequences may run."""
        name, _, count = settings.speculate.partition(":")
        if name == "off":
            return Speculation()
        method: Literal["lookup", "mtp"] = "mtp" if name == "mtp" else "lookup"
        most_rows = min(_MOST_ROWS[method][settings.device], settings.max_step_sequences, settings.max_step_tokens)
        return Speculation(int(count or _DEFAULT_TOKENS[method]), most_rows, method)

    def with_drafts(self, chunks: list[Chunk], sequences: Mapping[int, Drafted], pages: PageAllocator) -> list[Chunk]:
        """Return the chunks, those with a draft that get one; `sequences` are theirs, by key.

        Takes the pages that drafts need, of which every running sequence is left one. Where the module guesses, chunks
        say what it needs, and how many tokens it is to guess for drafts of the next step.
        """
        chunks = self._drafted(chunks, sequences, pages)
        if not self.is_mtp:
            return chunks
        # A module runs for all rows of a step: it pays where all of the next one's may have a draft.
        is_full = 2 * sum(chunk.is_sampled for chunk in chunks) > self.max_rows
        return [self._for_module(chunk, sequences[chunk.key], is_full=is_full) for chunk in chunks]

    def _for_module(self, chunk: Chunk, sequence: Drafted, *, is_full: bool) -> Chunk:
        if not chunk.is_sampled:
            return replace(chunk, next_id=sequence.token_ids[chunk.start + len(chunk.token_ids)])
        if is_full:
            return chunk
        # It has a token more by then, and one that is drawn behind the draft.
        num_left = sequence.finish.num_left(len(sequence.output_ids), len(sequence.token_ids)) - 2
        num_wanted = sequence.drafting.num_wanted(max(0, min(self.num_tokens, num_left)))
        return replace(chunk, num_wanted=num_wanted) if num_wanted else chunk

    def _drafted(self, chunks: list[Chunk], sequences: Mapping[int, Drafted], pages: PageAllocator) -> list[Chunk]:
        num_left = self.max_rows - len(chunks)
        if num_left <= 0 or not self.num_tokens or any(len(c.token_ids) > 1 or not c.is_sampled for c in chunks):
            return chunks
        drafted: list[Chunk] = []
        for chunk in chunks:
            draft = self._draft(sequences[chunk.key], min(self.num_tokens, num_left), pages, num_others=len(chunks))
            num_left -= len(draft)
            if draft:
                chunk = replace(chunk, token_ids=[*chunk.token_ids, *draft], num_draft=len(draft))
            drafted.append(chunk)
        return drafted

    def _draft(self, sequence: Drafted, count: int, pages: PageAllocator, *, num_others: int) -> list[int]:
        num_tokens = len(sequence.token_ids)
        # The token that is drawn behind the draft is the sequence's last at the latest.
        count = min(count, sequence.finish.num_left(len(sequence.output_ids), num_tokens) - 1)
        num_new = pages.pages_for(num_tokens + count) - len(sequence.pages.page_ids)
        if num_new > 0 and num_new + num_others > pages.num_available_in(sequence.pages.lane):
            count = len(sequence.pages.page_ids) * pages.page_size - num_tokens
        draft = sequence.drafting.guess(sequence.token_ids, count) if count > 0 else []
        end = next((i for i, token in enumerate(draft) if sequence.finish.is_stop(token)), len(draft))
        draft = draft[:end]
        if draft:
            pages.reserve(sequence.pages, num_tokens + len(draft))
        return draft


NO_DRAFTS = Speculation()
