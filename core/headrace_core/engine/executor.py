"""The torch side of a step: zero, forward, sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from headrace_core.batch.step import Chunk, FatalStepError, OnLayer, OnStop, StepPlan, StepResult, StepTiming, step_load
from headrace_core.errors import HeadraceError
from headrace_core.grammar import Grammars
from headrace_core.model.drafts import forget_draws, sample_chunks
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.op_timer import MTP, OFF, OTHER, SAMPLING, OpTimer, RunningOpTimer
from headrace_core.request import PromptLogprobs, SampledToken


class StepModel(Protocol):
    """What the executor needs of a model. Engine thread only."""

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> torch.Tensor:
        """Compute the chunks, writing their cache; return [chunks that are sampled, V] float32 logits, in order.

        `on_layer` may be told after each layer how many are done: nothing more is written to those.
        """
        ...

    def take_failures(self) -> dict[int, HeadraceError]:
        """Return, by key, why chunks that are not sampled of the last step can't be gone on with."""
        ...

    def take_prompt_logprobs(self) -> dict[int, PromptLogprobs]:
        """Return what the last step said of prompts, by the keys of its chunks with a `scoring`."""
        ...

    def take_expert_counts(self) -> dict[int, list[int]]:
        """Return tokens per routed expert, by layer, since the last call; empty for a model without experts."""
        ...


class MtpModel(Protocol):
    """A model whose module for multi-token prediction guesses. Engine thread only."""

    def guess(
        self, chunks: Sequence[Chunk], tokens: Mapping[int, Sequence[int]], cache: KvCache
    ) -> dict[int, list[int]]:
        """Write the module's rows of the step that was just computed; return guesses of chunks that want some, by key.

        `tokens` are what the sampled chunks gave, by key.
        """
        ...


class Executor:
    """Owns the model and its cache; engine thread only.

    Every `timing_period`-th step is measured operation by operation; 0: none. `num_threads` is asked before each step,
    and after each layer, on how many CPU threads to compute; None: as many as torch has. `grammars` None: no sequence
    has one. `mtp` None: plans run none.
    """

    def __init__(
        self,
        model: StepModel,
        cache: KvCache,
        *,
        timing_period: int = 0,
        num_threads: Callable[[], int] | None = None,
        grammars: Grammars | None = None,
        mtp: MtpModel | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._timing_period = timing_period
        self._num_threads = num_threads
        self._grammars = grammars
        self._mtp = mtp
        self._num_steps = 0

    def step(self, plan: StepPlan, on_stop: OnStop | None = None) -> StepResult:
        """Run one plan. A chunk that can't go on is among the result's failures; the others have their tokens.

        Raises:
            FatalStepError: the device is lost.
            Exception: anything else the model raised. The plan, or parts of it, can be run again: nothing of this run
                is counted, and what it wrote is written again.
        """
        started = time.perf_counter()
        self._set_threads()
        running = self._running_timer()
        timer = running or OFF
        with torch.inference_mode(), _lost_device_is_fatal():
            try:
                outcomes = self._compute(plan, timer, on_stop)
                guesses = self._guess(plan, outcomes, timer)
            except torch.AcceleratorError:
                raise
            except Exception:
                self._model.take_expert_counts()
                raise
            is_scored = any(chunk.scoring is not None for chunk in plan.chunks)
            prompt_logprobs = self._model.take_prompt_logprobs() if is_scored else {}
            failures = self._model.take_failures()
            expert_counts = self._model.take_expert_counts()
        chunks = [chunk for chunk in plan.chunks if chunk.is_sampled]
        pairs = list(zip(chunks, outcomes, strict=True))
        failed = [(chunk, failures[chunk.key]) for chunk in plan.chunks if chunk.key in failures]
        failed += [(chunk, error) for chunk, error in pairs if isinstance(error, HeadraceError)]
        return StepResult(
            tokens={chunk.key: tokens for chunk, tokens in pairs if isinstance(tokens, list)},
            failures={chunk.key: chunk.error(error) for chunk, error in failed},
            duration_s=time.perf_counter() - started,
            expert_counts=expert_counts,
            timing=StepTiming(step_load(plan.forward.rows), dict(running.seconds)) if running else None,
            guesses=guesses,
            prompt_logprobs={key: each for key, each in prompt_logprobs.items() if key not in failures},
        )

    def _compute(
        self, plan: StepPlan, timer: OpTimer, on_stop: OnStop | None
    ) -> list[list[SampledToken] | HeadraceError]:
        forward = plan.forward
        chunks = [chunk for chunk in forward.chunks if chunk.is_sampled]
        rows = [plan.sampling[chunk.key] for chunk in chunks]
        if forward.zero_page_ids:
            self._cache.zero_pages(forward.zero_page_ids)
        timer.mark(OTHER)
        on_layer = self._on_layer(forward.stops, on_stop)
        logits = self._model.forward(forward.rows, self._cache, timer, on_layer)
        outcomes = sample_chunks(logits, chunks, rows, self._grammars)
        timer.mark(SAMPLING)
        return outcomes

    def _guess(
        self, plan: StepPlan, outcomes: Sequence[list[SampledToken] | HeadraceError], timer: OpTimer
    ) -> dict[int, list[int]]:
        if not plan.forward.runs_mtp:
            return {}
        assert self._mtp is not None, "plans run the module where there is one"
        sampled = [chunk for chunk in plan.chunks if chunk.is_sampled]
        tokens = {
            chunk.key: [token.token_id for token in outcome]
            for chunk, outcome in zip(sampled, outcomes, strict=True)
            if isinstance(outcome, list)
        }
        try:
            return self._mtp.guess(plan.chunks, tokens, self._cache)
        except Exception:
            forget_draws(plan.sampling.values())
            raise
        finally:
            timer.mark(MTP)

    def _on_layer(self, stops: Sequence[int], on_stop: OnStop | None) -> OnLayer | None:
        def on_layer(num_layers: int) -> None:
            if on_stop and num_layers in stops:
                on_stop(num_layers, self._cache.mark())
            self._set_threads()

        return on_layer if (on_stop and stops) or self._num_threads else None

    def _set_threads(self) -> None:
        if self._num_threads is not None:
            count = self._num_threads()
            if count != torch.get_num_threads():
                torch.set_num_threads(count)

    def _running_timer(self) -> RunningOpTimer | None:
        self._num_steps += 1
        is_due = self._timing_period > 0 and self._num_steps % self._timing_period == 0
        return RunningOpTimer() if is_due else None


@contextmanager
def _lost_device_is_fatal() -> Generator[None]:
    try:
        yield
    except torch.AcceleratorError as error:
        raise FatalStepError(f"the device failed: {error}") from error
