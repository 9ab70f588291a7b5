"""An executor's book: from diffs back to whole plans. Engine thread only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace_core.batch.step import Chunk, ForwardPlan, SamplingMemo, SamplingRow, StepPlan
from headrace_core.batch.step_diff import BookDisagreesError, PlacesBook, Row, SamplerJoin, StepDiff


@dataclass(slots=True)
class _Sampler:
    """What a sequence's tokens are chosen by; `output_token_ids` grows with what is sampled."""

    told: SamplerJoin
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    memo: SamplingMemo = field(default_factory=SamplingMemo)


class ExecutorBook:
    """The book of the executor called `name`. `plan`, then `sampled`, step by step."""

    def __init__(self, name: str, *, lane_pages: int | None = None) -> None:
        """Args: `lane_pages`: how many ids each lane has, so that a page's id says which; None: there is one lane."""
        self._name = name
        self._lane_pages = lane_pages
        self._book = PlacesBook()
        self._names: dict[int, str] = {}
        self._sampled: dict[int, Sequence[int]] = {}
        """Tokens sampled after each sequence's last row."""
        self._samplers: dict[int, _Sampler] = {}

    @property
    def digest(self) -> int:
        """64 bits over the book's contents."""
        return self._book.digest

    def plan(self, diff: StepDiff) -> StepPlan:
        """Return the whole plan, and keep what the next diff builds on. Its lists are the book's own.

        Raises:
            BookDisagreesError: the diff was made for another book.
        """
        book = self._book
        if (diff.number, diff.digest) != (book.number + 1, book.digest):
            raise BookDisagreesError(
                f"executor {self._name} is before step {book.number + 1} with a book of digest {book.digest:016x}; it "
                f"was given step {diff.number} for {diff.digest:016x}: its group must be started again"
            )
        book.number = diff.number
        for key in diff.left:
            self._leave(key)
        self._names.update(diff.names)
        for join in diff.joins:
            self._samplers[join.key] = _Sampler(join, list(join.prompt_token_ids), list(join.output_token_ids))
        chunks = [self._chunk(row) for row in diff.rows]
        sampling = {row.key: self._sampling(row) for row in diff.rows if row.is_sampled and row.key in self._samplers}
        return StepPlan(ForwardPlan(chunks, list(diff.zero_page_ids), diff.stops), sampling)

    def sampled(self, token_ids: Mapping[int, Sequence[int]]) -> None:
        """Take what the group's one rank that samples chose for the last plan's sampled rows, by key.

        The next diff says how many of them were accepted.
        """
        for key, tokens in token_ids.items():
            self._sampled[key] = tokens
            if key in self._samplers:
                self._samplers[key].output_token_ids.extend(tokens)

    def _chunk(self, row: Row) -> Chunk:
        token_ids = list(row.token_ids or self._sampled.get(row.key, ())[: row.num_tokens])
        if len(token_ids) != row.num_tokens or row.key not in self._names:
            raise BookDisagreesError(
                f"executor {self._name} has {len(token_ids)} of {row.num_tokens} tokens of sequence {row.key} from "
                f"position {row.start} on: its group must be started again"
            )
        self._book.move(row)
        self._sampled.pop(row.key, None)
        page_ids = self._book.places[row.key].page_ids
        lane = page_ids[0] // self._lane_pages if self._lane_pages else 0
        return Chunk(
            row.key,
            token_ids,
            row.start,
            page_ids,
            row.is_sampled,
            self._names[row.key],
            lane,
            num_draft=row.num_draft,
            scoring=row.scoring,
        )

    def _sampling(self, row: Row) -> SamplingRow:
        sampler, position = self._samplers[row.key], row.start + row.num_tokens - row.num_draft
        told = sampler.told
        num_output = position - len(sampler.prompt_token_ids)
        if num_output < len(sampler.output_token_ids):
            # Those that were not accepted never were, and what was counted of them is not to be kept.
            del sampler.output_token_ids[num_output:]
            sampler.memo = SamplingMemo()
        return SamplingRow(
            params=told.params,
            prompt_token_ids=sampler.prompt_token_ids,
            output_token_ids=sampler.output_token_ids,
            sample_index=told.sample_index,
            position=position,
            eos_token_ids=told.eos_token_ids,
            memo=sampler.memo,
        )

    def _leave(self, key: int) -> None:
        self._book.leave(key)
        self._names.pop(key, None)
        self._sampled.pop(key, None)
        self._samplers.pop(key, None)
