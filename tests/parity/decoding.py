"""A decode worker's scheduler over a model, without a worker around it: what parity and benchmark of drafts share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.engine.executor import Executor
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.model import Model
from headrace_core.request import PromptLogprobs, SamplingParams
from headrace_decode.events import Output, Preempted, Scored
from headrace_decode.scheduler import DecodeScheduler
from headrace_decode.speculation import NO_DRAFTS, Speculation
from headrace_kernels import backend

_POOL_TOKENS = 16384


@dataclass(slots=True)
class Decoded:
    """What came of some sequences. Prompts' steps are counted apart; a row is a sequence's share of a step."""

    outputs: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    scored: dict[int, list[PromptLogprobs]] = field(default_factory=dict[int, list[PromptLogprobs]])
    num_rows: int = 0
    num_drafted: int = 0
    num_right: int = 0
    num_preempted: int = 0
    seconds: float = 0.0
    """CPU time of the thread in decode steps, planning and applying them included."""

    @property
    def num_tokens(self) -> int:
        """Tokens that decode steps gave."""
        return self.num_rows + self.num_right


class Decoding:
    """Sequences of one model; up to `max_sequences` run at a time."""

    def __init__(self, model: Model, *, max_sequences: int, page_size: int = 64) -> None:
        self._model = model
        self._max_sequences = max_sequences
        self._page_size = page_size
        self._cache = KvCache(model.kv_layout(page_size), _POOL_TOKENS // page_size, model.device)
        config = model.config
        self._limits = ModelLimits(config.vocab_size, config.max_context_tokens, tuple(config.eos_token_ids))
        if backend(self._cache.layers[0]) == "cpu":
            model.record_decode(self._cache, max_rows=64, max_context_tokens=config.max_context_tokens)
        self._executor = Executor(model, self._cache, mtp=model if model.has_mtp else None)

    def run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation = NO_DRAFTS,
        *,
        pool_tokens: int = _POOL_TOKENS,
        on_step: Callable[[StepPlan, StepResult, KvCache], None] = lambda plan, result, cache: None,
        allocator: PageAllocator | None = None,
        max_step_tokens: int = 512,
    ) -> Decoded:
        """Go on with every prompt to its end.

        `on_step` is called when a step is computed, before it is applied. `allocator` has the prefix cache of runs
        before; None: this one begins with none, and has `pool_tokens`.
        """
        scheduler = DecodeScheduler(
            allocator or PageAllocator(pool_tokens // self._page_size, self._page_size),
            self._limits,
            max_step_tokens=max_step_tokens,
            max_step_sequences=self._max_sequences,
            max_waiting_sequences=len(prompts),
            speculation=speculation,
        )
        for key, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            scheduler.add(key, SequenceSpec(f"r{key}", 1, 0, prompt, len(prompt), wanted), 0.0)
        found = Decoded({key: [] for key in range(len(prompts))})
        started = time.thread_time()
        while plan := scheduler.plan(0.0):
            result = self._executor.step(plan)
            on_step(plan, result, self._cache)
            scheduler.apply(result, 0.0)
            for event in scheduler.take_events():
                if isinstance(event, Output):
                    found.outputs[event.key].append(event.token.token_id)
                if isinstance(event, Scored):
                    found.scored.setdefault(event.key, []).append(event.logprobs)
                found.num_preempted += isinstance(event, Preempted)
            over = time.thread_time()
            if all(len(chunk.token_ids) - chunk.num_draft == 1 for chunk in plan.chunks):
                found.seconds += over - started
                found.num_rows += len(plan.chunks)
                found.num_drafted += sum(chunk.num_draft for chunk in plan.chunks)
                found.num_right += sum(len(tokens) - 1 for tokens in result.tokens.values())
            started = over
        return found
