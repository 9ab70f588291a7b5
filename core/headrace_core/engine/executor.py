"""The torch side of a step: zero, forward, sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from headrace_core.engine.engine import FatalStepError
from headrace_core.engine.step import Chunk, StepPlan, StepResult
from headrace_core.kv.cache import KvCache
from headrace_core.model.sampler import sample


class StepModel(Protocol):
    """What the executor needs of a model. Engine thread only."""

    def forward(self, chunks: Sequence[Chunk], cache: KvCache) -> torch.Tensor:
        """Compute the chunks, writing their cache; return [chunks with sampling, V] float32 logits, in order."""
        ...

    def take_expert_counts(self) -> dict[int, list[int]]:
        """Return tokens per routed expert, by layer, since the last call; empty for a model without experts."""
        ...


class Executor:
    """Owns the model and its cache; engine thread only."""

    def __init__(self, model: StepModel, cache: KvCache) -> None:
        self._model = model
        self._cache = cache

    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan.

        Raises:
            HeadraceError: BAD_LOGITS and other failures of the step's sequences.
            FatalStepError: the device is lost.
        """
        started = time.perf_counter()
        rows = [chunk.sampling for chunk in plan.chunks if chunk.sampling is not None]
        with torch.inference_mode():
            if plan.zero_page_ids:
                self._cache.zero_pages(plan.zero_page_ids)
            try:
                logits = self._model.forward(plan.chunks, self._cache)
                tokens = sample(logits, rows) if rows else []
            except torch.AcceleratorError as error:
                raise FatalStepError(f"the device failed: {error}") from error
        keys = [chunk.key for chunk in plan.chunks if chunk.sampling is not None]
        return StepResult(
            tokens=dict(zip(keys, tokens, strict=True)),
            duration_s=time.perf_counter() - started,
            expert_counts=self._model.take_expert_counts(),
        )
