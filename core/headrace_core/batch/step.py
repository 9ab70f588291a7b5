"""What a step is asked to do and what it answers: the values that cross from scheduler to model and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from headrace_core.errors import HeadraceError
from headrace_core.request import PromptLogprobs, SampledToken, SamplingParams
from headrace_core.roofline.step_load import StepLoad

Mark = object
"""A point in what a device was given to do, as the cache marks it; whoever copies pages waits for it."""

COMING = -1
"""Stands for a token that the step before samples for the same sequence: whoever computes has it by then."""

OnLayer = Callable[[int], None]
"""Told how many layers of a step are done: the step writes nothing more to them."""

OnStop = Callable[[int, Mark | None], None]
"""Told of layers as well, and with what mark their writing is done on the device."""


class FatalStepError(Exception):
    """A step failed in a way that no later step can survive, as a sticky device error; the process must end."""


@dataclass(slots=True, eq=False)
class SamplingMemo:
    """What the sampler keeps of one sequence from token to token, so that it need not look at all of it each time.

    Made with the sequence, the same in each of its rows, dropped with it; only the sampler looks inside. A sequence's
    tokens only grow while it has one memo.
    """

    kept: object | None = None


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """All that choosing one sequence's next token depends on.

    `params.seed` is set. `position` is the new token's, counted from the prompt's first token. `eos_token_ids` are
    the model's; with `params.stop_token_ids` they are what `min_tokens` forbids. The lists are the sequence's own, as
    they are until the step is applied.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sample_index: int
    position: int
    eos_token_ids: tuple[int, ...]
    memo: SamplingMemo = field(default_factory=SamplingMemo, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Tokens of a prompt whose log-probabilities a chunk's rows give: row `first_row` + i that of number i.

    `num_top` most probable tokens in each one's place are wanted besides.
    """

    first_row: int
    token_ids: Sequence[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of a step: compute `token_ids` at positions `start` ... and, if `is_sampled`, the logits.

    `page_ids` are the sequence's pages, in order, covering at least `start + len(token_ids)` tokens; positions before
    `start` are already in them. The list is the sequence's own, as it is until the step is applied. `is_sampled` when
    the chunk reaches the end of what is known, so that the next token is chosen from the logits at its last token.
    The last `num_draft` of `token_ids` are a guess at what follows those before them, and are not in the cache of the
    next step if they were wrong; such a chunk is sampled, one token of it is known, and the logits are those at every
    token. `request_id` is for messages. `lane` says whose of a group's caches the pages are in (`ranks.layout`).
    Where the step runs the checkpoint's MTP module (`ForwardPlan.runs_mtp`), `next_id` is the token behind the chunk,
    if it is known and not sampled, and `num_wanted` how many tokens to guess behind those that it gives. `scoring` is
    what is to be said of the prompt besides, by rows that are not sampled.

    Computing a chunk again, in whatever company, writes the same to the same places.
    """

    key: int
    token_ids: list[int]
    start: int
    page_ids: list[int]
    is_sampled: bool
    request_id: str = ""
    lane: int = 0
    num_draft: int = 0
    next_id: int | None = None
    num_wanted: int = 0
    scoring: Scoring | None = None

    def without_draft(self) -> Chunk:
        """Return the chunk of the tokens that are known."""
        return replace(self, token_ids=self.token_ids[: len(self.token_ids) - self.num_draft], num_draft=0)

    def behind(self, given: Sequence[int]) -> list[int]:
        """Return the tokens that follow its own, each by one, when it gave these: of what was right, and is known.

        None if it was sampled and gave nothing; one less than it has if nobody said what follows it.
        """
        if self.is_sampled and not given:
            return []
        known = self.token_ids[1 : len(self.token_ids) - self.num_draft]
        if self.is_sampled:
            return [*known, *given]
        return known if self.next_id is None else [*known, self.next_id]

    def rows(self) -> list[Chunk]:
        """Return what a model is given of a chunk with a draft: a chunk for each of its tokens, which are sampled."""
        return [
            Chunk(self.key, [token], position, self.page_ids, self.is_sampled, self.request_id, self.lane)
            for position, token in enumerate(self.token_ids, start=self.start)
        ]

    def error(self, error: HeadraceError) -> HeadraceError:
        """Return `error` as this chunk's sequence's: its message names the request."""
        return type(error)(error.reason, f"request {self.request_id}: {error}")


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What every rank of a model computes in a step.

    `zero_page_ids` are filled with zeros before it: pages that will be handed off with unused slots, which are zero on
    the wire. `stops` are numbers of layers, rising: the scheduler is told when so many are done (`LayerWatch`).
    `runs_mtp`: when the tokens are drawn, the MTP module has its rows written and guesses what chunks want.
    """

    chunks: list[Chunk]
    zero_page_ids: list[int] = field(default_factory=list[int])
    stops: tuple[int, ...] = ()
    runs_mtp: bool = False

    @property
    def rows(self) -> list[Chunk]:
        """What a model computes: the chunks, of one with a draft each token by itself, as plain decoding would."""
        if not any(chunk.num_draft for chunk in self.chunks):
            return self.chunks
        return [row for chunk in self.chunks for row in (chunk.rows() if chunk.num_draft else (chunk,))]

    def part(self, chunks: list[Chunk]) -> ForwardPlan:
        """Return the plan of some of the chunks alone, with their own pages to zero, without stops and guesses."""
        page_ids = set[int]().union(*(chunk.page_ids for chunk in chunks))
        return ForwardPlan(chunks, [page_id for page_id in self.zero_page_ids if page_id in page_ids])


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass of one ragged batch, never empty, and what the one rank that samples needs besides.

    `sampling` has a row for each chunk that `is_sampled`, by `Chunk.key`.
    """

    forward: ForwardPlan
    sampling: dict[int, SamplingRow] = field(default_factory=dict[int, SamplingRow])

    @property
    def chunks(self) -> list[Chunk]:
        """The forward pass's chunks."""
        return self.forward.chunks

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def halves(self) -> tuple[StepPlan, StepPlan]:
        """Return two plans that together do the same, each with its own chunks' pages to zero, and without stops."""
        middle = len(self.chunks) // 2
        return self._part(self.chunks[:middle]), self._part(self.chunks[middle:])

    def without_drafts(self) -> StepPlan:
        """Return the plan as it would be had nothing been guessed, and were nothing to be."""
        chunks = [chunk.without_draft() for chunk in self.chunks]
        return StepPlan(replace(self.forward, chunks=chunks, runs_mtp=False), self.sampling)

    @property
    def has_guesses(self) -> bool:
        """Whether `without_drafts` is another plan."""
        return self.forward.runs_mtp or any(chunk.num_draft for chunk in self.chunks)

    def _part(self, chunks: list[Chunk]) -> StepPlan:
        sampling = {chunk.key: self.sampling[chunk.key] for chunk in chunks if chunk.is_sampled}
        return StepPlan(self.forward.part(chunks), sampling)


class LayerWatch(Protocol):
    """Who is told how far the planned step is, to hand pages of its first layers on. Engine thread only."""

    def layers_done(self, num_layers: int, mark: Mark | None) -> None:
        """See `OnStop`. Called at the plan's stops, in order; not at all where a step does not run layer by layer."""
        ...

    def step_raised(self) -> None:
        """Take note that the step raised: what it wrote is about to be written again, without stops."""
        ...


def step_load(chunks: Sequence[Chunk]) -> StepLoad:
    """Return what the chunks ask of the network, in the roofline's terms.

    A single token after a cached prefix is decode, whichever worker it runs on: that is how the network computes it.
    """
    load = StepLoad()
    for chunk in chunks:
        count = len(chunk.token_ids)
        if chunk.start > 0 and count == 1:
            load += StepLoad.decode(1, chunk.start + 1)
        else:
            load += StepLoad.prefill(count, chunk.start)
    return replace(load, num_logits=sum(chunk.is_sampled for chunk in chunks))


@dataclass(frozen=True, slots=True)
class StepTiming:
    """A step that was measured: its load, and where its seconds went (`model.op_timer`), which sum to the step's."""

    load: StepLoad
    op_seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of each chunk, by `Chunk.key`: the tokens that follow it if it is sampled, or why it can't go on.

    A sampled chunk has one token at least, or a failure; what a failed one left in its pages is unknown.
    `duration_s` is on the engine's clock. `expert_counts` are the tokens each routed expert got, by layer. `timing` is
    there if the step was measured. `guesses` are what may follow the tokens of chunks that wanted some.
    `prompt_logprobs` are those of chunks that have a `scoring` and no failure.
    """

    tokens: dict[int, list[SampledToken]]
    duration_s: float
    expert_counts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    timing: StepTiming | None = None
    failures: dict[int, HeadraceError] = field(default_factory=dict[int, HeadraceError])
    guesses: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict[int, PromptLogprobs])
