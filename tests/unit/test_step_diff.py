"""A step's plan as a diff: what executors make of it is the whole plan, and one that is astray is told so by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from headrace_core.batch.executor_book import ExecutorBook
from headrace_core.batch.step import Chunk, FatalStepError, ForwardPlan, SamplingRow, Scoring, StepPlan, StepResult
from headrace_core.batch.step_diff import BookDisagreesError, Differ, StepDiff
from headrace_core.engine.plan_messages import decode, encode
from headrace_core.errors import HeadraceError, ProtocolError
from headrace_core.request import SampledToken, SamplingParams
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import Drafting, Speculation
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.decode_plan_parts import prompt, scheduler, spec

PARAMS = SamplingParams(seed=7, temperature=0.5, stop_token_ids=(3,), logit_bias={4: -1.0}, presence_penalty=0.5)


def copied(plan: StepPlan) -> StepPlan:
    """A plan's lists are its sequences' and grow."""
    chunks = [
        dataclasses.replace(chunk, page_ids=list(chunk.page_ids), token_ids=list(chunk.token_ids))
        for chunk in plan.chunks
    ]
    rows = {
        key: dataclasses.replace(
            row, output_token_ids=list(row.output_token_ids), prompt_token_ids=list(row.prompt_token_ids)
        )
        for key, row in plan.sampling.items()
    }
    return StepPlan(dataclasses.replace(plan.forward, chunks=chunks), rows)


def drawn(chunk: Chunk, row: SamplingRow) -> list[int]:
    """Return as much of the chunk's draft as the position says, and a token more."""
    total = sum(row.prompt_token_ids + row.output_token_ids) * 31 + row.position
    return [*chunk.token_ids[1:][: total % (chunk.num_draft + 1)], total % 50 + 1]


def guessed(token_ids: Sequence[int], count: int) -> list[int]:
    """Return a draft of some length, or none."""
    return [(sum(token_ids) + i) % 50 + 1 for i in range(sum(token_ids) % (count + 1))]


class Rank:
    """An executor at the other end of a wire."""

    def __init__(self, name: str, *, samples: bool = True) -> None:
        self.book = ExecutorBook(name)
        self._samples = samples

    def plan(self, message: bytes) -> StepPlan:
        diff = decode(message)
        return self.book.plan(diff if self._samples else dataclasses.replace(diff, joins=()))


class Group:
    """A scheduler, its differ and two executors, of which the first samples."""

    def __init__(self, scheduler: DecodeScheduler) -> None:
        self.scheduler, self.differ = scheduler, Differ()
        self.ranks = [Rank("rank 0"), Rank("rank 1", samples=False)]

    def step(self, failing: int = 0) -> bool:
        """Run a step, of which the first `failing` rows fail; False if there is nothing to run."""
        plan = self.scheduler.plan(0.0)
        if plan is None:
            return False
        running = {sequence.key for sequence in self.scheduler._running}
        message = encode(self.differ.diff(plan, running))
        first, second = (rank.plan(message) for rank in self.ranks)
        assert first == copied(plan)
        assert second == StepPlan(plan.forward)
        failures = {chunk.key: HeadraceError("BAD_LOGITS", "x") for chunk in plan.chunks[:failing]}
        tokens = {
            chunk.key: drawn(chunk, first.sampling[chunk.key])
            for chunk in first.chunks
            if chunk.is_sampled and chunk.key not in failures
        }
        for rank in self.ranks:
            rank.book.sampled(tokens)
        result = {key: [SampledToken(token) for token in some] for key, some in tokens.items()}
        self.scheduler.apply(StepResult(result, 0.0, failures=failures), 0.0)
        return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_book_made_of_diffs_is_the_whole_plan_whatever_happens(data: st.DataObject):
    """Prompts in chunks, shared prefixes, drafts, pre-emption for want of pages, failures, pauses, cancellations."""
    speculation = Speculation(data.draw(st.integers(0, 3)), 12)
    pages = data.draw(st.integers(6, 24))
    group = Group(scheduler(num_pages=pages, max_step_tokens=12, max_step_sequences=5, speculation=speculation))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafting, "guess", lambda _, token_ids, count: guessed(token_ids, count))
        run_anything(group, data)


def run_anything(group: Group, data: st.DataObject) -> None:
    key = 0
    for _ in range(data.draw(st.integers(5, 40))):
        match data.draw(st.sampled_from(["add", "step", "step", "step", "abort", "pause", "resume", "hand off"])):
            case "add":
                key += 1
                shared = data.draw(st.integers(0, 9))
                tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9][:shared] + prompt(key + 9, data.draw(st.integers(1, 9)))
                group.scheduler.add(key, spec(tokens, max_tokens=data.draw(st.integers(1, 12))), 0.0, group=key % 2)
            case "hand off":
                key += 1
                group.scheduler.add(key, spec(prompt(key + 9, 5)), 0.0, has_handoff=True)
                group.scheduler.admit(0.0)
                group.scheduler.arrived(key, 9)
            case "abort":
                group.scheduler.abort(data.draw(st.integers(0, key)))
            case "pause":
                group.scheduler.pause(1)
            case "resume":
                group.scheduler.resume(1)
            case _:
                group.step(failing=data.draw(st.sampled_from([0, 0, 0, 1])))
    group.scheduler.resume(1)
    for _ in range(30):
        group.step()


def row(position: int, output: list[int]) -> SamplingRow:
    return SamplingRow(PARAMS, [4, 5, 6], output, 2, position, (0, 1))


def plans() -> list[StepPlan]:
    """A prompt in two chunks beside one token, then a token of both."""
    return [
        StepPlan(
            ForwardPlan(
                [
                    Chunk(1, [4, 5], 0, [8, 9], False, "one", scoring=Scoring(1, [6], 3)),
                    Chunk(-2, [6], 2, [3], True, "zwei ü"),
                ],
                [9],
                (1, 3),
            ),
            {-2: row(3, [])},
        ),
        StepPlan(
            ForwardPlan([Chunk(1, [6], 2, [8, 7], True, "one"), Chunk(-2, [11], 3, [3, 4], True, "zwei ü")]),
            {1: row(3, []), -2: row(4, [11])},
        ),
    ]


def diffs() -> list[StepDiff]:
    differ = Differ()
    return [differ.diff(plan, {1, -2}) for plan in plans()]


def test_a_message_is_the_diff_and_one_that_is_cut_or_longer_or_of_another_version_is_none():
    for diff in diffs():
        message = encode(diff)
        again = decode(message)
        assert encode(again) == message
        assert [each.scoring and each.scoring.num_top for each in again.rows] == [
            each.scoring and each.scoring.num_top for each in diff.rows
        ]
        assert (again.number, again.digest, again.names, again.stops) == (
            diff.number, diff.digest, diff.names, diff.stops,
        )  # fmt: skip
        assert [join.params for join in again.joins] == [PARAMS] * len(diff.joins)
        for size in range(len(message)):
            with pytest.raises(ProtocolError):
                decode(message[:size])
        for wrong in (message + b"\0", b"\4" + message[1:]):
            with pytest.raises(ProtocolError, match="no plan of a step"):
                decode(wrong)


def test_tokens_that_the_executor_sampled_are_not_told_and_pages_are_from_the_first_that_is_another():
    first, second = diffs()
    assert [(r.first_page, list(r.page_ids), list(r.token_ids)) for r in first.rows] == [
        (0, [8, 9], [4, 5]),
        (0, [3], [6]),
    ]
    assert [(r.first_page, list(r.page_ids), list(r.token_ids)) for r in second.rows] == [(1, [7], [6]), (1, [4], [])]
    assert [join.key for join in second.joins] == [1]
    assert second.names == {}


@pytest.mark.parametrize("spoil", ["lost", "twice", "pages", "older"])
def test_an_executor_whose_book_is_another_is_named_and_ends_its_group(spoil):
    first, second = diffs()
    book = ExecutorBook("rank 3")
    if spoil != "lost":
        book.plan(first)
    wrong = {"lost": second, "twice": first, "pages": second, "older": dataclasses.replace(second, number=1)}[spoil]
    if spoil == "pages":
        book._book.places[1].page_ids[0] = 5
        book._book.places[1].pages_sum += 1
        book._book.digest = sum(places.digest(key) for key, places in book._book.places.items()) % 2**64
    with pytest.raises(BookDisagreesError, match=r"executor rank 3 .*must be started again") as caught:
        book.plan(wrong)
    assert isinstance(caught.value, FatalStepError), "no later step is run"


def test_tokens_that_never_came_are_named():
    first, second = diffs()
    book = ExecutorBook("rank 1")
    book.plan(first)
    with pytest.raises(BookDisagreesError, match="executor rank 1 has 0 of 1 tokens of sequence -2 from position 3"):
        book.plan(second)


def test_what_was_sampled_and_not_accepted_never_was():
    differ, book = Differ(), ExecutorBook("rank 0")
    start = StepPlan(ForwardPlan([Chunk(1, [4, 5, 6], 0, [0, 1], True, "r")]), {1: row(3, [])})
    book.plan(differ.diff(start, {1}))
    book.sampled({1: [7, 8, 9]})
    goes_on = StepPlan(ForwardPlan([Chunk(1, [7, 8], 3, [0, 1], True, "r")]), {1: row(5, [7, 8])})
    assert book.plan(differ.diff(goes_on, {1})) == goes_on


def test_the_digest_is_that_of_what_the_book_holds():
    first, second = diffs()
    book = ExecutorBook("rank 0")
    empty = book.digest
    book.plan(first)
    assert book.digest == second.digest != empty
    book.sampled({-2: [11]})
    book.plan(second)
    gone = Differ()
    for plan in plans():
        gone.diff(plan, {1, -2})
    last = gone.diff(StepPlan(ForwardPlan([])), ())
    assert list(last.left) == [1, -2]
    book.plan(last)
    assert book.digest == empty


def test_books_of_many_sequences_differ_by_any_page_and_any_place():
    seen: set[int] = set()
    for key in range(20):
        for page in range(20):
            differ = Differ()
            differ.diff(StepPlan(ForwardPlan([Chunk(key, [1], 0, [page], False)])), {key})
            seen.add(differ._book.digest)
    assert len(seen) == 400
