"""A step that raises is run again in halves, and they in theirs, until what raises is alone in its step.

That sequence fails, the others have their tokens. So n sequences are computed at most log2 n + 1 times each, and once
more if the step had drafts or was to make some, which goes first: no sequence fails by a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from headrace_core.batch.step import Chunk, FatalStepError, StepPlan, StepResult
from headrace_core.errors import HeadraceError

log = logging.getLogger(__name__)


class Halves:
    """Runs plans by `step`; `on_raised` is called before a plan is run again."""

    def __init__(
        self, step: Callable[[StepPlan], StepResult], on_raised: Callable[[], None], *, clock: Callable[[], float]
    ) -> None:
        self._step = step
        self._on_raised = on_raised
        self._clock = clock

    def run(self, plan: StepPlan) -> StepResult:
        """Run the plan, or what of it can be run.

        Raises:
            FatalStepError: no later step can be run either.
        """
        started = self._clock()
        try:
            return self._step(plan)
        except FatalStepError:
            raise
        except Exception as cause:  # noqa: BLE001 - the boundary: what fails is a sequence, not the process
            if len(plan.chunks) == 1 and not plan.has_guesses:
                return _failed(plan.chunks[0], cause, self._clock() - started)
            log.warning(
                "a step raised; its parts are run", extra={"sequences": len(plan.chunks), "problem": repr(cause)}
            )
        self._on_raised()
        if plan.has_guesses:
            return replace(self.run(plan.without_drafts()), duration_s=self._clock() - started)
        first, second = (self.run(half) for half in plan.halves())
        return _joined(first, second, self._clock() - started)


def _failed(chunk: Chunk, cause: Exception, duration_s: float) -> StepResult:
    error = cause if isinstance(cause, HeadraceError) else _engine_failed(cause)
    error = chunk.error(error)
    error.__cause__ = cause
    return StepResult({}, duration_s, failures={chunk.key: error})


def _engine_failed(cause: Exception) -> HeadraceError:
    return HeadraceError(
        "ENGINE_FAILED",
        f"computing its next token raised {type(cause).__name__}, also alone; the worker's log has the traceback, and "
        "the checkpoint may be damaged",
    )


def _joined(first: StepResult, second: StepResult, duration_s: float) -> StepResult:
    """Return what two halves of a step amount to; it was not measured as one."""
    counts = dict(first.expert_counts)
    for layer, added in second.expert_counts.items():
        counts[layer] = [a + b for a, b in zip(counts.get(layer, [0] * len(added)), added, strict=True)]
    return StepResult(
        tokens=first.tokens | second.tokens,
        duration_s=duration_s,
        expert_counts=counts,
        failures=first.failures | second.failures,
        prompt_logprobs=first.prompt_logprobs | second.prompt_logprobs,
    )
