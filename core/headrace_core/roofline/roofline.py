"""Time at the roof: each operation takes as long as its slowest resource needs at that resource's peak.

    seconds = max(FLOPs / peak, bytes / memory bandwidth, sent / link, sent / network) + runs x overhead

It is a floor: no overlap is assumed between operations, perfect overlap inside one. `Hardware.derated` turns it into a
prediction. Bytes and FLOPs are `operations`; this module divides them by what a machine can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headrace_core.roofline.communication import (
    CROSSING,
    LINK_LATENCY,
    NETWORK_LATENCY,
    ONCE_A_NODE,
    ONE_GPU,
    Parallelism,
)
from headrace_core.roofline.formula import evaluate
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.operations import MlaPath, Operation, Phase, operations, step_operations
from headrace_core.roofline.routing import UNIFORM, Routing
from headrace_core.roofline.step_load import StepLoad

Bound = Literal["compute", "memory", "link", "network"]

ROOF = {
    "compute": "flops/peak",
    "memory": "bytes/memory",
    "link": f"sent*(1-{CROSSING})/link + {LINK_LATENCY}",
    "network": f"sent*{CROSSING}*{ONCE_A_NODE}/network + {NETWORK_LATENCY}",
}
"""Seconds that each resource needs, for an operation's totals."""

_BOUNDS: tuple[Bound, ...] = ("compute", "memory", "link", "network")


@dataclass(frozen=True, slots=True)
class OperationTime:
    """An operation and its time at the roof; `share` is of the step's total, 0 for an overlapped operation."""

    operation: Operation
    time_s: float
    bound: Bound
    share: float

    @property
    def name(self) -> str:
        """The operation's name."""
        return self.operation.name

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.operation.intensity


@dataclass(frozen=True, slots=True)
class Roofline:
    """A step's operations with their times, in the order in which they run."""

    shape: ModelShape
    hardware: Hardware
    parallel: Parallelism
    load: StepLoad
    dtype: Dtype
    operations: tuple[OperationTime, ...]
    time_s: float

    @property
    def flops(self) -> float:
        """FLOPs of the busiest GPU."""
        return sum(row.operation.flops for row in self.operations)

    @property
    def bytes(self) -> float:
        """Bytes that the busiest GPU moves through its memory, without overlapped operations."""
        return sum(row.operation.bytes for row in self.operations if not row.operation.is_overlapped)

    @property
    def comm_bytes(self) -> float:
        """Bytes that the busiest GPU sends to others of its worker."""
        return sum(row.operation.comm_bytes for row in self.operations if not row.operation.is_overlapped)

    @property
    def overlapped_s(self) -> float:
        """Seconds of what runs beside the step, the KV transfer; it is hidden if below `time_s`."""
        return sum(row.time_s for row in self.operations if row.operation.is_overlapped)

    def shares_by_bound(self) -> dict[Bound, float]:
        """Return which part of the time each resource is the limit."""
        return {bound: sum(row.share for row in self.operations if row.bound == bound) for bound in _BOUNDS}


def predict_step(
    shape: ModelShape, hardware: Hardware, load: StepLoad, parallel: Parallelism = ONE_GPU, *,
    routing: Routing = UNIFORM, dtype: Dtype = Dtype.BF16, kv_dtype: Dtype | None = None, mla: MlaPath = "auto",
    experts_read: float | None = None,
) -> Roofline:  # fmt: skip
    """Return seconds and bytes of each operation of a worker's step, which may mix prefill chunks and decode.

    `experts_read` is how many experts a layer's tokens did choose, on average, if that is known; else it is expected.
    """
    costs = step_operations(
        shape, load, parallel, routing=routing, dtype=dtype, kv_dtype=kv_dtype, mla=mla, experts_read=experts_read
    )
    return _at_the_roof(shape, hardware, load, parallel, dtype, costs)


def roofline(
    shape: ModelShape, hardware: Hardware, *, phase: Phase, batch: int, context: int, new_tokens: int | None = None,
    parallel: Parallelism = ONE_GPU, routing: Routing = UNIFORM, dtype: Dtype = Dtype.BF16,
    kv_dtype: Dtype | None = None, mla: MlaPath = "auto",
) -> Roofline:  # fmt: skip
    """Return the roofline of a step of `batch` equal sequences.

    `context` counts a sequence's tokens after the step. `new_tokens` None: one in decode, all in prefill.

    Raises:
        ValueError: `new_tokens` is not in 1..context, or `batch` is below 1.
    """
    new = new_tokens or (context if phase == "prefill" else 1)
    costs = operations(
        shape, phase=phase, batch=batch, context=context, new_tokens=new, dtype=dtype, parallel=parallel,
        routing=routing, kv_dtype=kv_dtype, mla=mla,
    )  # fmt: skip
    if phase == "prefill":
        load = StepLoad.prefill(new, context - new, batch=batch)
    else:
        load = StepLoad.decode(batch, batch * context, new_tokens=new)
    return _at_the_roof(shape, hardware, load, parallel, dtype, costs)


def decode_step_s(
    shape: ModelShape, hardware: Hardware, parallel: Parallelism, *, batch: int, context_tokens_total: float,
    routing: Routing = UNIFORM, dtype: Dtype = Dtype.BF16, kv_dtype: Dtype | None = None,
) -> float:  # fmt: skip
    """Return seconds of a decode step of `batch` sequences that hold `context_tokens_total` tokens together."""
    load = StepLoad.decode(batch, context_tokens_total)
    return predict_step(shape, hardware, load, parallel, routing=routing, dtype=dtype, kv_dtype=kv_dtype).time_s


def prefill_s(
    shape: ModelShape, hardware: Hardware, parallel: Parallelism, *, new_tokens: int, cached_tokens: int = 0,
    batch: int = 1, routing: Routing = UNIFORM, dtype: Dtype = Dtype.BF16, kv_dtype: Dtype | None = None,
) -> float:  # fmt: skip
    """Return seconds to prefill `batch` prompts of `new_tokens` after `cached_tokens` that are in the cache."""
    load = StepLoad.prefill(new_tokens, cached_tokens, batch=batch)
    return predict_step(shape, hardware, load, parallel, routing=routing, dtype=dtype, kv_dtype=kv_dtype).time_s


def _at_the_roof(
    shape: ModelShape, hardware: Hardware, load: StepLoad, parallel: Parallelism, dtype: Dtype,
    costs: Sequence[Operation],
) -> Roofline:  # fmt: skip
    timed = [(cost, *_roof(cost, hardware)) for cost in costs]
    total = sum(seconds for cost, seconds, _ in timed if not cost.is_overlapped)
    rows = tuple(
        OperationTime(cost, seconds, bound, 0.0 if cost.is_overlapped else seconds / total)
        for cost, seconds, bound in timed
    )
    return Roofline(shape, hardware, parallel, load, dtype, rows, total)


def _roof(cost: Operation, hardware: Hardware) -> tuple[float, Bound]:
    symbols = {
        "flops": cost.flops, "bytes": cost.bytes, "sent": cost.comm_bytes,
        "span": cost.comm_gpus, "choices": cost.choices, "hops": cost.hops, "runs": cost.runs,
        "peak": hardware.flops_per_s(cost.math), "memory": hardware.memory_bytes_per_s,
        "link": hardware.link_bytes_per_s, "network": hardware.network_bytes_per_s, "domain": hardware.link_domain,
        "start": hardware.collective_start_s, "hop": hardware.link_hop_s, "network_hop": hardware.network_hop_s,
    }  # fmt: skip
    seconds = evaluate([ROOF[bound] for bound in _BOUNDS], symbols)
    slowest = max(range(len(_BOUNDS)), key=lambda index: seconds[index])
    return seconds[slowest] + cost.runs * hardware.operation_overhead_s, _BOUNDS[slowest]
