"""Step times from the roofline: `roofline.predict_step`, sampled once on a grid."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_core.roofline.communication import ONE_GPU, Parallelism
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.roofline.step_load import StepLoad

from headrace_planner.step_times import TableStepTimes, chunk_pairs, tabulate

_ROUTED = frozenset({"dispatch", "expert_gate", "expert_up", "expert_down", "combine"})
"""Operations that wait for the busiest rank of an expert-parallel group."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on some GPUs: what a worker's step times follow from."""

    shape: ModelShape
    hardware: Hardware
    parallel: Parallelism = ONE_GPU
    dtype: Dtype = Dtype.BF16
    kv_dtype: Dtype | None = None

    def step(self, load: StepLoad) -> Roofline:
        """Return a step of the whole worker, experts loaded evenly."""
        return predict_step(self.shape, self.hardware, load, self.parallel, dtype=self.dtype, kv_dtype=self.kv_dtype)

    def decode_s(self, rows: float, context: float) -> float:
        """Return seconds of a decode step of `rows` sequences of `context` tokens each."""
        return self.step(StepLoad.decode(max(1, round(rows)), rows * context)).time_s

    def prefill_s(self, tokens: float, start: float = 0.0) -> float:
        """Return seconds of a step that computes `tokens` of prompts, an equal part on each data-parallel group."""
        groups = self.parallel.dp
        return self.step(StepLoad.prefill(max(1, round(tokens / groups)), round(start), batch=groups)).time_s

    def prefill_pairs(self, tokens: float, start: float) -> float:
        """Return the query-key pairs of such a step."""
        groups = self.parallel.dp
        return groups * chunk_pairs(round(start), max(1, round(tokens / groups)))

    def routed_s(self, tokens: float) -> float:
        """Return the part of a decode step of `tokens` rows that routed experts, dispatch and combine take."""
        rows = self.step(StepLoad.decode(max(1, round(tokens)), tokens)).operations
        return sum(row.time_s for row in rows if row.name in _ROUTED)


def roofline_times(
    machine: Machine, *, max_rows: int, max_tokens: int, max_context: int = 131072, imbalance: float = 1.0
) -> TableStepTimes:
    """Return step times of a worker.

    Args:
        machine: the worker's GPUs and model.
        max_rows: largest decode batch, of the whole worker.
        max_tokens: largest step.
        max_context: longest sequence.
        imbalance: most loaded expert-parallel rank / mean.
    """
    table = tabulate(
        machine.decode_s,
        machine.prefill_s,
        machine.routed_s,
        machine.prefill_pairs,
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_context=max_context,
        groups=machine.parallel.dp,
    )
    return table.with_imbalance(imbalance)
