"""Ordinary clients: every answer is compared, token for token, with the one that was computed alone.

Half of the requests are greedy, half sampled with seeds; some ask for two samples, stop strings, log-probabilities. A
greedy request takes part if its answer has enough distinct tokens and no near-tie (`checks`: tiny models repeat).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace_client import AsyncClient, Generation
from headrace_client.codec import Collector
from headrace_core.errors import HeadraceError
from headrace_core.request import SamplingParams

_MIN_DISTINCT_TOKENS = 16
LEAST_MARGIN = 1e-3
"""Between the two likeliest tokens, where another order of additions may change the logits."""
_TIMEOUT_S = 120.0
_HEROES = (
    "Zorvim",
    "Lumira",
    "Tokka",
    "Berion",
    "Quill",
    "Nessa",
    "Ardo",
    "Mirabel",
    "Pip",
    "Solenne",
    "Gruffin",
    "Oona",
)
_ANIMALS = ("fox", "bear", "rabbit", "owl", "hedgehog", "mouse")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a healthy client."""

    prompt: str
    params: SamplingParams
    n: int = 1


Answer = tuple[tuple[tuple[int, ...], str, str], ...]
"""(token ids, finish reason, matched stop string) of each sample."""


def requests(*, most_repeats: int = 55) -> list[Request]:
    """Return candidates: short prompts and long ones, a sentence up to `most_repeats` times, greedy and sampled."""
    made: list[Request] = []
    for i, hero in enumerate(_HEROES):
        animal = _ANIMALS[i % len(_ANIMALS)]
        prompt = f"Once upon a time there was a little {animal} named {hero}. " + f"The {animal} was brave. " * (
            i * most_repeats // (len(_HEROES) - 1)
        )
        made.append(Request(prompt, SamplingParams(temperature=0.0, max_tokens=48 + 4 * i, top_logprobs=2)))
        sampled = SamplingParams(
            temperature=0.9, top_p=0.95, top_k=60, min_p=0.01, repetition_penalty=1.1, seed=100 + i, max_tokens=48,
            stop_strings=("night", "forest") if i % 2 else (), top_logprobs=3 if i % 3 == 0 else None,
        )  # fmt: skip
        made.append(Request(prompt, sampled, n=2 if i % 4 == 0 else 1))
    return made


def answer_of(generation: Generation) -> Answer:
    """Return what must be the same every time."""
    return tuple(
        (sample.token_ids, sample.finish_reason.value, sample.matched_stop_string) for sample in generation.samples
    )


def is_telling(request: Request, generation: Generation, *, least_margin: float) -> bool:
    """Return whether the answer can show a wrong token: varied, and without near-ties where that can be seen."""
    sample = generation.samples[0]
    if request.params.temperature:
        return True
    margins = [entry.top[0][1] - entry.top[1][1] for entry in sample.logprobs]
    return len(set(sample.token_ids)) >= _MIN_DISTINCT_TOKENS and min(margins) >= least_margin


async def references(
    client: AsyncClient, candidates: Sequence[Request], *, least_margin: float = LEAST_MARGIN
) -> list[tuple[Request, Answer]]:
    """Return the requests that take part with their answers, each computed twice, alone.

    Raises:
        AssertionError: two answers of an idle cluster differ.
    """
    found: list[tuple[Request, Answer]] = []
    for request in candidates:
        first, second = [
            await client.generate(request.prompt, request.params, n=request.n, timeout_s=_TIMEOUT_S) for _ in range(2)
        ]
        assert answer_of(first) == answer_of(second), f"an idle cluster gave two answers to {request.prompt[:60]!r}"
        if is_telling(request, first, least_margin=least_margin):
            found.append((request, answer_of(first)))
    return found


def fault_of(got: Answer, wanted: Answer) -> str:
    """Return what became of a token of an answer that differs: it is "twice" there, "lost", or simply "wrong"."""
    for (ours, *_), (theirs, *_) in zip(got, wanted, strict=False):
        if ours == theirs:
            continue
        if len(ours) < len(theirs) and theirs[: len(ours)] == ours:
            return "lost"
        start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        for size in range(1, 1 + len(ours) - start):
            rest = ours[start + size :]
            if ours[start - size : start] == ours[start : start + size] and theirs[start : start + len(rest)] == rest:
                return "twice"
            after = theirs[start + size :]
            if after and ours[start : start + len(after)] == after:
                return "lost"
    return "wrong"


@dataclass(slots=True)
class HealthyResult:
    """What the clients saw."""

    num_exact: int = 0
    num_sampled: int = 0
    wrong: list[str] = field(default_factory=list[str])
    """Answers that differ, and how: see `fault_of`."""
    errors: Counter[str] = field(default_factory=Counter[str])
    slowest_gap_s: float = 0.0
    slowest_first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list[float])


async def run_clients(
    address: str, options, references: Sequence[tuple[Request, Answer]], *, num_clients: int, until: asyncio.Event
) -> HealthyResult:
    """Ask again and again until `until` is set; requests under way are finished."""
    result = HealthyResult()
    await asyncio.gather(
        *(_client(number, address, options, references, result, until) for number in range(num_clients))
    )
    return result


async def _client(
    number: int,
    address: str,
    options,
    pairs: Sequence[tuple[Request, Answer]],
    result: HealthyResult,
    until: asyncio.Event,
) -> None:
    order = list(pairs)
    random.Random(number).shuffle(order)
    async with AsyncClient(address, options) as client:
        for request, wanted in itertools.cycle(order):
            if until.is_set():
                return
            try:
                got = answer_of(await _ask(client, request, result))
            except HeadraceError as error:
                result.errors[error.reason] += 1
                continue
            if got == wanted:
                result.num_exact += 1
                result.num_sampled += bool(request.params.temperature)
            else:
                fault = fault_of(got, wanted)
                result.wrong.append(
                    f"{fault}: {request.prompt[:50]!r} ({request.params.seed}): {got} instead of {wanted}"
                )


async def _ask(client: AsyncClient, request: Request, result: HealthyResult) -> Generation:
    collector = Collector()
    last_s = began_s = time.monotonic()
    is_first = True
    async with client.stream(request.prompt, request.params, n=request.n, timeout_s=_TIMEOUT_S) as stream:
        async for delta in stream:
            now_s = time.monotonic()
            if is_first:
                result.slowest_first_s = max(result.slowest_first_s, now_s - began_s)
            else:
                result.slowest_gap_s = max(result.slowest_gap_s, now_s - last_s)
                result.gaps_s.append(now_s - last_s)
            is_first, last_s = False, now_s
            collector.add(delta)
    return collector.generation()
