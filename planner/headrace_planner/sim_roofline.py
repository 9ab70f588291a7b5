"""Step times from the roofline: `roofline.predict_step`, sampled once on a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from headrace_core.roofline.communication import ONE_GPU, Parallelism
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype, MlaShape, ModelShape
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.roofline.step_load import StepLoad

from headrace_planner.step_times import ChosenPairs, TableStepTimes, chunk_pairs, tabulate

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
        return groups * self.pairs_of()(round(start), max(1, round(tokens / groups)))

    def pairs_of(self) -> Callable[[float, float], float]:
        """Return what a chunk's attention counts as, by its start and tokens: query-key pairs."""
        shape, attention = self.shape, self.shape.attention
        if not isinstance(attention, MlaShape) or not (indexer := attention.indexer):
            return chunk_pairs
        # FLOPs of a pair: scored, of a chosen latent, and of expanded keys and values; the last two at one peak.
        dtype = self.dtype.activation
        peaks = self.hardware.flops_per_s(dtype) / self.hardware.flops_per_s(self.kv_dtype or dtype)
        chosen = shape.num_heads / self.parallel.tp * (2 * attention.kv_lora_rank + attention.rope_dim)
        expanded = shape.num_heads / self.parallel.tp * (attention.nope_dim + attention.rope_dim + attention.value_dim)
        return ChosenPairs(indexer.top_k, peaks * indexer.num_heads * indexer.head_dim / chosen, expanded / chosen)

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
    return replace(table.with_imbalance(imbalance), pairs_of=machine.pairs_of())
