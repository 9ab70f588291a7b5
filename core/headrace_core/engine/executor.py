"""The torch side of a step: zero, forward, sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from headrace_core.batch.step import Chunk, StepPlan, StepResult, StepTiming, step_load
from headrace_core.engine.engine import FatalStepError
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.op_timer import OFF, OTHER, SAMPLING, OpTimer, RunningOpTimer
from headrace_core.model.sampler import sample


class StepModel(Protocol):
    """What the executor needs of a model. Engine thread only."""

    def forward(self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF) -> torch.Tensor:
        """Compute the chunks, writing their cache; return [chunks with sampling, V] float32 logits, in order."""
        ...

    def take_expert_counts(self) -> dict[int, list[int]]:
        """Return tokens per routed expert, by layer, since the last call; empty for a model without experts."""
        ...


class Executor:
    """Owns the model and its cache; engine thread only.

    Every `timing_period`-th step is measured operation by operation; 0: none.
    """

    def __init__(self, model: StepModel, cache: KvCache, *, timing_period: int = 0) -> None:
        self._model = model
        self._cache = cache
        self._timing_period = timing_period
        self._num_steps = 0

    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan.

        Raises:
            HeadraceError: BAD_LOGITS and other failures of the step's sequences.
            FatalStepError: the device is lost.
        """
        started = time.perf_counter()
        running = self._running_timer()
        timer = running or OFF
        rows = [chunk.sampling for chunk in plan.chunks if chunk.sampling is not None]
        with torch.inference_mode():
            try:
                if plan.zero_page_ids:
                    self._cache.zero_pages(plan.zero_page_ids)
                timer.mark(OTHER)
                logits = self._model.forward(plan.chunks, self._cache, timer)
                tokens = sample(logits, rows) if rows else []
                timer.mark(SAMPLING)
                expert_counts = self._model.take_expert_counts()
            except torch.AcceleratorError as error:
                raise FatalStepError(f"the device failed: {error}") from error
        keys = [chunk.key for chunk in plan.chunks if chunk.sampling is not None]
        return StepResult(
            tokens=dict(zip(keys, tokens, strict=True)),
            duration_s=time.perf_counter() - started,
            expert_counts=expert_counts,
            timing=StepTiming(step_load(plan.chunks), dict(running.seconds)) if running else None,
        )

    def _running_timer(self) -> RunningOpTimer | None:
        self._num_steps += 1
        is_due = self._timing_period > 0 and self._num_steps % self._timing_period == 0
        return RunningOpTimer() if is_due else None
