"""What a rank of a group does in the parity tests; in a module of its own, which its process imports."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from headrace_core.batch.step import Chunk, Scoring
from headrace_core.model.group_results import gather_failures, not_finite
from headrace_core.model.load import load_model
from headrace_core.model.numerics import Numerics
from headrace_core.model.self_check import check_kernels
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.group import ALONE, RankGroup, Ranks, ranks_of
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.ranks.sharding import Owners
from headrace_core.ranks.two_batches import with_two_batches
from headrace_core.request import PromptLogprobs
from headrace_core.testing.paged_sequences import PagedSequences, generate_greedy
from headrace_kernels import use_backend
from headrace_kernels.backend import Backend


class Case(NamedTuple):
    """A checkpoint, shared out: "tpN" or "dpN" attention, "tpN" or "epN" experts.

    Decode steps with `least_rows` in every lane are two micro-batches; 0: none is. Sequences are twice as many then.
    """

    folder: Path
    attention: str
    experts: str
    least_rows: int = 0


class Generated(NamedTuple):
    """What a group made of the prompts, and its model's fingerprint."""

    tokens: list[list[int]]
    fingerprint: str
    num_cut: int = 0
    """Steps that were two micro-batches."""


def generate(world: RankGroup, case: Case, prompts: list[list[int]], num_tokens: int) -> Generated:
    """Return greedy tokens, on every rank."""
    ranks = _ranks(case, world)
    cut = _counted(ranks)
    model = load_model(case.folder, ranks=ranks)
    all_prompts = prompts * 2 if case.least_rows else prompts
    tokens = generate_greedy(model, all_prompts, num_tokens, page_size=16, max_chunk=8, ranks=ranks)
    return Generated(tokens, model.fingerprint, len(cut))


def _counted(ranks: Ranks) -> list[None]:
    """Return a list that grows by one with every step that is two micro-batches."""
    cut: list[None] = []
    turns = ranks.turns
    if turns is not None:
        run = turns.run
        turns.run = lambda first, second: (cut.append(None), run(first, second))[1]
    return cut


class Bits(NamedTuple):
    """Logits of a few steps, rank 0's, and the model's fingerprint."""

    logits: list[torch.Tensor]
    fingerprint: str
    num_cut: int = 0


class Options(NamedTuple):
    """How a model is loaded and computed; `owners` of the experts of layers 1 and 2, None: they lie in a row."""

    owners: Owners | None = None
    numerics: Numerics = Numerics.FAST
    dtype: str = "auto"
    kernels: Backend | None = None
    dispatch: DispatchDtype = DispatchDtype.AUTO
    weights: WeightsDtype = WeightsDtype.AUTO


def steps(folder: Path, options: Options, ranks: Ranks = ALONE) -> Bits:
    """Return the logits of a step of prompts, of two decode steps, and of one that one sequence alone is in."""
    owners = {} if options.owners is None else dict.fromkeys((1, 2), options.owners)
    cut = _counted(ranks)
    with use_backend(options.kernels) if options.kernels else nullcontext():
        model = load_model(
            folder,
            ranks=ranks,
            expert_owners=owners,
            dtype=options.dtype,
            numerics=options.numerics,
            dispatch_dtype=options.dispatch,
            weights_dtype=options.weights,
        )
        sequences = PagedSequences(model, page_size=16, num_pages=16)
        logits: list[torch.Tensor] = []
        for step, keys in enumerate([range(5), range(5), range(5), range(1, 2)]):
            count = 1 if step else 19
            tokens = {key: [3 + (key * 31 + step * 7 + i * 11) % 150 for i in range(count)] for key in keys}
            chunks = [replace(sequences.chunk(key, tokens[key]), lane=key % ranks.layout.num_lanes) for key in keys]
            logits.append(model.forward(chunks, sequences.cache).clone())
        return Bits(logits, model.fingerprint, len(cut))


class Found(NamedTuple):
    """What a rank found: of each case that generates, of each that computes steps, and of failures."""

    generated: dict[Case, Generated]
    steps: dict[tuple[Case, Options], Bits]
    failures: list[str]
    sent_bytes: dict[tuple[Case, DispatchDtype], int]
    checked: float
    """By how much the kernels and plain torch differ, as a worker finds it before it serves."""


class ToDo(NamedTuple):
    """What a group of ranks is to try."""

    prompts: list[list[int]]
    num_tokens: int
    generate: list[Case]
    steps: list[tuple[Case, Options]]
    send: list[tuple[Case, DispatchDtype]]


def all_of(world: RankGroup, to_do: ToDo) -> Found:
    """Do everything in one group, since a process takes longer to start than a case to compute."""
    return Found(
        {case: generate(world, case, to_do.prompts, to_do.num_tokens) for case in to_do.generate},
        {(case, options): steps(case.folder, options, _ranks(case, world)) for case, options in to_do.steps},
        _failures(world),
        {(case, dtype): _sent_bytes(world, case, dtype) for case, dtype in to_do.send},
        _checked(world, to_do.generate[0].folder),
    )


def scores(world: RankGroup, cases: list[Case]) -> list[dict[int, list[PromptLogprobs]]]:
    """Return what rank 0 learns of five prompts of `scored_prompt`, two chunks each, which take turns at the lanes."""
    found: list[dict[int, list[PromptLogprobs]]] = []
    for case in cases:
        ranks = _ranks(case, world)
        model = load_model(case.folder, ranks=ranks)
        sequences = PagedSequences(model, page_size=16, num_pages=16)
        said: dict[int, list[PromptLogprobs]] = {}
        for start, end in ((0, 7), (7, 19)):
            chunks = [
                replace(
                    sequences.chunk(key, scored_prompt(key)[start:end]),
                    lane=key % ranks.layout.num_lanes,
                    is_sampled=end == 19,
                    scoring=Scoring(0, scored_prompt(key)[start + 1 : end + 1], 4),
                )
                for key in range(5)
            ]
            model.forward(chunks, sequences.cache)
            for key, each in model.take_prompt_logprobs().items():
                said.setdefault(key, []).append(each)
        found.append(said)
    return found


def scored_prompt(key: int) -> list[int]:
    """Return 19 tokens."""
    return [3 + (key * 31 + i * 11) % 150 for i in range(19)]


TOKENS = [65, 64, 65, 64]
"""Of the sequences of `_sent_bytes`, which take turns at the lanes; in bfloat16 a sum over them all is a large one."""


def _sent_bytes(world: RankGroup, case: Case, dtype: DispatchDtype) -> int:
    """Return what this rank sends in a step of prompts that are all sampled after."""
    ranks = _ranks(case, world)
    model = load_model(case.folder, ranks=ranks, dispatch_dtype=dtype)
    sequences = PagedSequences(model, page_size=16, num_pages=24)
    chunks = [
        replace(
            sequences.chunk(key, [3 + (key * 31 + i * 7) % 150 for i in range(count)]),
            lane=key % ranks.layout.num_lanes,
        )
        for key, count in enumerate(TOKENS)
    ]
    groups = {id(group): group for group in (ranks.world, ranks.lane)}.values()
    before = sum(group.sent_bytes for group in groups)
    model.forward(chunks, sequences.cache)
    return sum(group.sent_bytes for group in groups) - before


def _checked(world: RankGroup, folder: Path) -> float:
    ranks = ranks_of(ParallelLayout.parse("tp1", f"ep{world.size}"), world)
    return check_kernels(load_model(folder, ranks=ranks), "cpu", num_lanes=ranks.layout.num_lanes)


def _ranks(case: Case, world: RankGroup) -> Ranks:
    return with_two_batches(ranks_of(ParallelLayout.parse(case.attention, case.experts), world), case.least_rows)


def _failures(world: RankGroup) -> list[str]:
    """Return what this rank learns if the second chunk of the second lane failed."""
    ranks = ranks_of(ParallelLayout.parse("tp1", f"ep{world.size}"), world)
    chunks = [Chunk(key, [5], 0, [0], is_sampled=key == 0, lane=lane) for key, lane in ((0, 0), (1, 1), (2, 1))]
    hidden = torch.tensor([[1.0], [float("nan")]])
    own = not_finite(hidden, [0, 1], chunks[1:]) if ranks.lane_number == 1 else {}
    return [f"{key} {error.reason}" for key, error in gather_failures(own, chunks, ranks, "cpu").items()]
