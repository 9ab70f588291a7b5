"""A step's plan as what it changes in a book that every executor keeps, so that it is short enough to be sent.

The scheduler's side has a `Differ`, each executor an `ExecutorBook`. In the book are, for each sequence that runs, its
pages and how far it is; with the executor that samples also what its tokens are chosen by. A diff names the rows of the
step, the pages that are new or others, tokens that the executor did not sample itself, and who left. Rows are absolute.

A diff says which book it was made for: a number, one more than that of the step before, and 64 bits over the book's
contents. Where they differ the executors of a group would go on with different caches, and nothing can be put right.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from headrace_core.batch.step import Chunk, FatalStepError, SamplingRow, Scoring, StepPlan
from headrace_core.request import SamplingParams

_MASK = (1 << 64) - 1


class BookDisagreesError(FatalStepError):
    """A plan was made for another book than an executor has; the executor is named."""


class Row(NamedTuple):
    """A sequence's share of the step: `num_tokens` tokens from position `start`.

    Its pages from number `first_page` on are `page_ids`, those before are as they were; -1: they all are. `token_ids`
    are empty where the executor has them: they are the ones that it sampled after the sequence's last row. Those of a
    row with a draft (`Chunk.num_draft`) are told, and of the next: how much was right only the scheduler's side says.
    `scoring` is the chunk's.
    """

    key: int
    start: int
    num_tokens: int
    is_sampled: bool
    first_page: int = -1
    page_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    num_draft: int = 0
    scoring: Scoring | None = None


@dataclass(frozen=True, slots=True)
class SamplerJoin:
    """What a sequence's tokens are chosen by, told once: with its first row that is sampled."""

    key: int
    params: SamplingParams
    sample_index: int
    eos_token_ids: tuple[int, ...]
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepDiff:
    """One step. `names` are request ids of sequences that are new, by key; `joins` are for the rank that samples."""

    number: int
    digest: int
    rows: Sequence[Row]
    left: Sequence[int] = ()
    names: dict[int, str] = field(default_factory=dict[int, str])
    zero_page_ids: Sequence[int] = ()
    stops: tuple[int, ...] = ()
    joins: Sequence[SamplerJoin] = ()


@dataclass(slots=True)
class Places:
    """Where a sequence is: its pages, the position after its last row, whether the executor has the token there."""

    page_ids: list[int] = field(default_factory=list[int])
    end: int = 0
    is_sampled: bool = False
    pages_sum: int = 0
    """Over `page_ids`; computed again when they change."""

    def move(self, row: Row) -> None:
        """Be where `row` leads."""
        if row.first_page >= 0:
            self.page_ids[row.first_page :] = row.page_ids
            self.pages_sum = crc32(array("q", self.page_ids).tobytes())
        self.end, self.is_sampled = row.start + row.num_tokens, row.is_sampled and not row.num_draft

    def digest(self, key: int) -> int:
        """Return 64 bits over all of it."""
        mixed = (
            key * 0x9E3779B97F4A7C15 + self.end * 0xBF58476D1CE4E5B9 + self.pages_sum * 2 + self.is_sampled
        ) & _MASK
        mixed = (mixed ^ mixed >> 30) * 0x94D049BB133111EB & _MASK
        return mixed ^ mixed >> 31


class PlacesBook:
    """What both sides keep: where each sequence is, and the digest of that, which costs what a step changes."""

    def __init__(self) -> None:
        self.number = 0
        self.digest = 0
        self.places: dict[int, Places] = {}

    def move(self, row: Row) -> None:
        """Follow a row; a key that is not known is a sequence that joins."""
        places = self.places.get(row.key)
        if places is None:
            places = self.places[row.key] = Places()
        else:
            self.digest = (self.digest - places.digest(row.key)) & _MASK
        places.move(row)
        self.digest = (self.digest + places.digest(row.key)) & _MASK

    def leave(self, key: int) -> None:
        """Forget a sequence."""
        self.digest = (self.digest - self.places.pop(key).digest(key)) & _MASK


class Differ:
    """Makes diffs of whole plans, in the order in which they are launched. The scheduler's side."""

    def __init__(self) -> None:
        self._book = PlacesBook()
        self._joined: set[int] = set()
        """Whose `SamplerJoin` was told."""

    def diff(self, plan: StepPlan, running: Collection[int]) -> StepDiff:
        """Return what `plan` changes; `running` are the keys of all sequences that may have rows later, the plan's too.

        A key always stands for the same sequence, also when it left, as one pre-empted does, and comes again.
        """
        book, digest = self._book, self._book.digest
        left = [key for key in book.places if key not in running]
        for key in left:
            book.leave(key)
            self._joined.discard(key)
        names = {chunk.key: chunk.request_id for chunk in plan.chunks if chunk.key not in book.places}
        rows = [self._row(chunk) for chunk in plan.chunks]
        joins = [_join(key, row) for key, row in plan.sampling.items() if key not in self._joined]
        self._joined.update(plan.sampling)
        for row in rows:
            book.move(row)
        book.number += 1
        forward = plan.forward
        return StepDiff(book.number, digest, rows, left, names, forward.zero_page_ids, forward.stops, joins)

    def _row(self, chunk: Chunk) -> Row:
        places = self._book.places.get(chunk.key)
        known = places.page_ids if places else []
        first = -1 if known == chunk.page_ids else _first_other(known, chunk.page_ids)
        has_tokens = places is not None and places.is_sampled and chunk.start == places.end and not chunk.num_draft
        return Row(
            key=chunk.key,
            start=chunk.start,
            num_tokens=len(chunk.token_ids),
            is_sampled=chunk.is_sampled,
            first_page=first,
            page_ids=chunk.page_ids[first:] if first >= 0 else (),
            token_ids=() if has_tokens else chunk.token_ids,
            num_draft=chunk.num_draft,
            scoring=chunk.scoring,
        )


def _first_other(known: list[int], page_ids: list[int]) -> int:
    pairs = zip(known, page_ids, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(known), len(page_ids)))


def _join(key: int, row: SamplingRow) -> SamplerJoin:
    # The row's lists are the sequence's own and grow.
    prompt, output = list(row.prompt_token_ids), list(row.output_token_ids)
    return SamplerJoin(key, row.params, row.sample_index, row.eos_token_ids, prompt, output)
