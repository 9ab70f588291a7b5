"""What one client's sampling parameters cost another's tokens: `python -m tests.perf.bystander`.

One sampled sequence decodes beside a neighbour's; schedulers, executor and sampler are the product's, on this thread.
`demo` computes the demo model; `wide` has the vocabulary of DeepSeek-V3, random logits and no network, so that sampling
is all there is. Seconds are of the thread's CPU, so that what else the machine does hardly matters. What validation
refuses is shown as refused.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, OnLayer
from headrace_core.engine.executor import Executor, StepModel
from headrace_core.errors import HeadraceError, InvalidRequestError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.request import SamplingParams
from headrace_decode.scheduler import DecodeScheduler, Output

from tests.perf.machine import machine

_ROOT = Path(__file__).parents[2]
_PAGE_SIZE = 16
_MOST_S = 2.0
_MOST_STEPS = 100
_USUAL = SamplingParams(max_tokens=100_000, temperature=0.7, top_p=0.9, seed=1, ignore_eos=True)


class WideModel:
    """Random logits over 129,280 tokens, the same at every step."""

    vocab_size = 129_280

    def __init__(self) -> None:
        self._logits = 3 * torch.randn(64, self.vocab_size)

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> torch.Tensor:
        """See `StepModel`."""
        return self._logits[: sum(chunk.is_sampled for chunk in chunks)]

    def take_failures(self) -> dict[int, HeadraceError]:
        """See `StepModel`."""
        return {}

    def take_expert_counts(self) -> dict[int, list[int]]:
        """See `StepModel`."""
        return {}


@dataclass(frozen=True)
class Neighbour:
    """A client: its parameters, how long its prompt is and how many samples it asks for."""

    name: str
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    num_prompt_tokens: int = 64
    num_samples: int = 1


def neighbours(vocab_size: int, long: int) -> list[Neighbour]:
    """Return an ordinary client and those that ask for much; `long` tokens are the longest prompt."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(5 + i % (vocab_size - 6) for i in range(count))

    never = (vocab_size - 1,) * 1_900_000

    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    return [
        Neighbour("ordinary"),
        Neighbour("1,900,000 stop ids", {"stop_token_ids": never}),
        Neighbour("1,900,000 stop ids, min_tokens", {"stop_token_ids": ids(1_900_000), "min_tokens": 99_999}),
        Neighbour("1,024 stop ids, min_tokens", {"stop_token_ids": ids(1024), "min_tokens": 99_999}),
        Neighbour("1,024 biases", {"logit_bias": dict.fromkeys(ids(1024), 0.5)}),
        Neighbour("long prompt", {}, long),
        Neighbour("long prompt, penalties", penalties, long),
        Neighbour("long prompt, n=8", {}, long, 8),
        Neighbour("long prompt, penalties, n=8", penalties, long, 8),
        Neighbour("ordinary, n=8", {}, 64, 8),
        Neighbour("top_k of nearly all, n=8", {"top_k": vocab_size - 1}, 64, 8),
        Neighbour("top_p at a high temperature, n=8", {"top_p": 0.99, "temperature": 1e5}, 64, 8),
    ]


def tokens_per_s(model: StepModel, layout: KvLayout, limits: ModelLimits, neighbour: Neighbour) -> float:
    """Return the tokens per second of this thread that a bystander gets beside `neighbour`, by the median step."""
    num_tokens = (neighbour.num_prompt_tokens + 1024) * neighbour.num_samples + 2048
    num_pages = num_tokens // _PAGE_SIZE
    cache = KvCache(layout, num_pages)
    scheduler = DecodeScheduler(
        PageAllocator(num_pages, _PAGE_SIZE),
        limits,
        max_step_tokens=2048,
        max_step_sequences=64,
        max_waiting_sequences=64,
    )
    run = Executor(model, cache)
    prompt = [5 + i % 1000 for i in range(neighbour.num_prompt_tokens)]
    params = replace(_USUAL, **neighbour.params)
    params.validate()
    scheduler.add(0, SequenceSpec("bystander", 1, 0, prompt[:64], 64, _USUAL), None, 0.0)
    for index in range(neighbour.num_samples):
        spec = SequenceSpec("neighbour", 1, index, prompt, len(prompt), params)
        spec.check(limits)
        scheduler.add(1 + index, spec, None, 0.0)
    seconds: list[float] = []
    last = time.thread_time()
    # The first step in which all decode may have computed the end of a prompt.
    while sum(seconds[1:]) < _MOST_S and len(seconds) < _MOST_STEPS:
        plan = scheduler.plan(0.0)
        assert plan is not None, "the bystander runs"
        scheduler.apply(run.step(plan), 0.0)
        events = scheduler.take_events()
        now = time.thread_time()
        num_rows = sum(isinstance(event, Output) for event in events)
        if num_rows > neighbour.num_samples:
            seconds.append(now - last)  # all of them decode
        elif seconds:
            break
        last = now
    return 1 / statistics.median(seconds[1:])


def main() -> None:
    """Print a table for both models."""
    torch.set_num_threads(1)
    print({**machine(), "threads": 1})  # noqa: T201
    demo = load_model(_ROOT / "demo" / "model")
    wide_layout = KvLayout(1, _PAGE_SIZE, CacheDtype.FLOAT32, LatentAttention(8, 8))
    for name, model, layout, vocab_size, long in (
        ("demo", demo, demo.kv_layout(_PAGE_SIZE), demo.config.vocab_size, 3000),
        ("wide", WideModel(), wide_layout, WideModel.vocab_size, 100_000),
    ):
        limits = ModelLimits(vocab_size, 200_000, (1,))
        for neighbour in neighbours(vocab_size, long):
            try:
                found = f"{tokens_per_s(model, layout, limits, neighbour):8.1f} tokens/s"
            except InvalidRequestError as error:
                found = f"refused: {error}"
            print(f"{name}  {neighbour.name:<34} {found}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
