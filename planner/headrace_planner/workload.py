"""Synthetic requests: Poisson or closed-loop arrivals, fixed or spread lengths, mixes. Deterministic by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import Workload
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths: log-normal around the means, clipped to 1 ... 8 times the mean; spread 0: all equal.

    `spread` is the standard deviation of the logarithm. Mooncake's conversations have about 1.1 in and 0.9 out.
    """

    num_prompt: float
    num_output: float
    prompt_spread: float = 0.0
    output_spread: float = 0.0


def poisson(lengths: Lengths, *, rate: float, num_requests: int, seed: int = 0) -> Workload:
    """Return requests whose gaps are exponential.

    Args:
        lengths: of prompts and outputs.
        rate: requests per second.
        num_requests: how many.
        seed: of the generator.

    Raises:
        InvalidRequestError: BAD_WORKLOAD.
    """
    if rate <= 0 or num_requests < 1:
        raise InvalidRequestError("BAD_WORKLOAD", f"rate {rate} and {num_requests} requests: both must be positive")
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1 / rate, num_requests))
    return _workload(lengths, arrival_s, random)


def closed_loop(lengths: Lengths, *, concurrency: int, num_requests: int, seed: int = 0) -> Workload:
    """Return requests of `concurrency` clients, each of which asks again as soon as it is answered.

    Raises:
        InvalidRequestError: BAD_WORKLOAD.
    """
    if concurrency < 1 or num_requests < 1:
        text = f"concurrency {concurrency} and {num_requests} requests: both must be positive"
        raise InvalidRequestError("BAD_WORKLOAD", text)
    workload = _workload(lengths, np.zeros(num_requests), np.random.default_rng(seed))
    return Workload(workload.arrival_s, workload.num_prompt, workload.num_output, max_in_flight=concurrency)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a mix that changes: so long requests of one kind come, at a rate."""

    seconds: float
    rate: float
    """Requests per second."""
    num_prompt: int
    num_output: int


def changing(phases: Sequence[Phase], *, seed: int = 0, block_tokens: int = 256) -> Workload:
    """Return the requests of one phase after the other, with exponential gaps.

    Args:
        phases: in order.
        seed: of the generator.
        block_tokens: the unit of fast fidelity's memory.
    """
    random = np.random.default_rng(seed)
    arrivals: list[NDArray[np.float64]] = []
    prompts: list[NDArray[np.int64]] = []
    outputs: list[NDArray[np.int64]] = []
    begin_s = 0.0
    for phase in phases:
        count = int(phase.seconds * phase.rate)
        times_s = np.cumsum(random.exponential(1 / phase.rate, count))
        times_s = begin_s + times_s[times_s < phase.seconds]
        arrivals.append(times_s)
        prompts.append(np.full(len(times_s), phase.num_prompt, dtype=np.int64))
        outputs.append(np.full(len(times_s), phase.num_output, dtype=np.int64))
        begin_s += phase.seconds
    lengths = np.concatenate(prompts), np.concatenate(outputs)
    return Workload(np.concatenate(arrivals), *lengths, block_tokens=block_tokens)


_MOST_TOKENS = 100_000_000


def parse_workload(text: str) -> tuple[Lengths, float]:
    """Read `isl,osl,rate`, as `4096,256,10`.

    Raises:
        InvalidRequestError: BAD_WORKLOAD.
    """
    try:
        num_prompt, num_output, rate = (float(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequestError("BAD_WORKLOAD", f"{text!r} is not isl,osl,rate, as 4096,256,10") from None
    if not (1 <= num_prompt <= _MOST_TOKENS and 1 <= num_output <= _MOST_TOKENS and 0 < rate < float("inf")):
        problem = f"{text!r}: lengths are from 1 to {_MOST_TOKENS} and the rate is positive and finite"
        raise InvalidRequestError("BAD_WORKLOAD", problem)
    return Lengths(num_prompt, num_output), rate


def _workload(lengths: Lengths, arrival_s: NDArray[np.float64], random: np.random.Generator) -> Workload:
    count = len(arrival_s)
    return Workload(
        arrival_s,
        _draw(lengths.num_prompt, lengths.prompt_spread, count, random),
        _draw(lengths.num_output, lengths.output_spread, count, random),
        block_tokens=block_tokens_of(lengths.num_prompt),
    )


def block_tokens_of(num_prompt: float) -> int:
    """Return fast fidelity's unit of memory, pages of 64 tokens: about a tenth of prompts of a mean length."""
    return 64 * int(min(16, max(1, num_prompt // 640)))


def _draw(mean: float, spread: float, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    if not spread:
        return np.full(count, round(mean), dtype=np.int64)
    values = random.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(np.rint(values), 1, 8 * mean).astype(np.int64)
