"""What workers measured, beside what the roofline predicted for the same steps: read from their metrics.

A worker's counters only grow; `since` gives what came after an earlier reading. Figures of a row are of a mean step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TypeVar

from headrace_core.address import parse_address
from headrace_core.metrics_page import read_metrics
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.hardware_measure import cpu_hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.operations import Phase
from headrace_core.roofline.roofline import roofline
from prometheus_client.parser import text_string_to_metric_families

from headrace_planner.measured import MeasuredPoint, MeasuredPoints

PHASES: tuple[Phase, ...] = ("prefill", "decode")
_TIMEOUT_S = 5.0
_OP_METRICS = {
    "headrace_op_measured_seconds_total": "measured_s",
    "headrace_op_predicted_seconds_total": "predicted_s",
    "headrace_op_bytes_total": "num_bytes",
    "headrace_op_flops_total": "flops",
}
_LOAD_METRICS = {
    "headrace_op_sampled_steps_total": "num_steps",
    "headrace_op_sampled_sequences_total": "num_sequences",
    "headrace_op_sampled_context_tokens_total": "num_context_tokens",
}
_MACHINE_METRICS = {
    "headrace_roofline_flops_per_second": "flops_per_s",
    "headrace_roofline_bytes_per_second": "bytes_per_s",
    "headrace_roofline_op_overhead_seconds": "overhead_s",
}


class LiveError(ValueError):
    """A worker's metrics can't be read, or it measures nothing."""


class UnreachableError(LiveError):
    """Nothing answers there with metrics."""


class NothingMeasuredError(LiveError):
    """Workers that measure have measured no step yet."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a worker predicts for, as it says."""

    hardware: str
    model: str
    dtype: Dtype
    kv_dtype: Dtype
    flops_per_s: float
    bytes_per_s: float
    overhead_s: float

    def as_hardware(self) -> Hardware:
        """Return it as hardware of a page."""
        return cpu_hardware(
            {self.dtype: self.flops_per_s}, memory_bytes_per_s=self.bytes_per_s, copy_bytes_per_s=self.bytes_per_s,
            operation_overhead_s=self.overhead_s, source=f"{self.hardware}, as a running worker says",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpSums:
    """One operation over the measured steps of a phase."""

    measured_s: float = 0.0
    predicted_s: float = 0.0
    num_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class PhaseLoad:
    """What the measured steps of a phase had to do, summed."""

    num_steps: float = 0.0
    num_sequences: float = 0.0
    num_context_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One worker's counters at one moment. `ops` by operation and phase; `machine` None while it is being measured."""

    address: str
    machine: Machine | None
    ops: Mapping[tuple[str, str], OpSums] = field(default_factory=dict[tuple[str, str], OpSums])
    loads: Mapping[str, PhaseLoad] = field(default_factory=dict[str, PhaseLoad])

    def since(self, before: Reading) -> Reading:
        """Return what came after `before`; all there is if the worker was restarted in between."""
        ops = {key: _minus(sums, before.ops.get(key, OpSums())) for key, sums in self.ops.items()}
        loads = {phase: _minus(sums, before.loads.get(phase, PhaseLoad())) for phase, sums in self.loads.items()}
        if before.loads.keys() - loads.keys() or any(load.num_steps < 0 for load in loads.values()):
            return self
        loads = {phase: load for phase, load in loads.items() if load.num_steps}
        return Reading(self.address, self.machine, {key: sums for key, sums in ops.items() if key[1] in loads}, loads)


@dataclass(frozen=True, slots=True)
class LiveRow:
    """One operation of a mean step. `ratio` is measured / predicted; both None for what the roofline does not count."""

    phase: str
    op: str
    measured_us: float
    predicted_us: float | None
    ratio: float | None
    share: float
    bound: str
    num_bytes: float
    flops: float


S = TypeVar("S", OpSums, PhaseLoad)


def _plus(one: S, other: S) -> S:
    return type(one)(*(a + b for a, b in zip(astuple(one), astuple(other), strict=True)))


def _minus(after: S, before: S) -> S:
    return type(after)(*(a - b for a, b in zip(astuple(after), astuple(before), strict=True)))


def read_worker(address: str) -> Reading:
    """Read a worker's metrics over HTTP.

    Raises:
        UnreachableError: It does not answer.
        LiveError: That is no address, or it does not measure operations.
    """
    hint = "the worker's log line `serving` names its metrics"
    try:
        parse_address(address)
    except ValueError as error:
        raise LiveError(f"{error}; {hint}") from None
    try:
        text = read_metrics(address, _TIMEOUT_S)
    except ValueError as error:
        raise UnreachableError(f"{error}; {hint}") from None
    return parse_reading(address, text)


def parse_reading(address: str, text: str) -> Reading:
    """Return what Prometheus' text says of operations.

    Raises:
        LiveError: Nothing.
        ValueError: It is no such text.
    """
    families = list(text_string_to_metric_families(text))
    if all(family.name != "headrace_op_sampled_steps" for family in families):
        raise LiveError(f"{address} measures no operations: not a worker, or one with --roofline-every-steps 0")
    ops: dict[tuple[str, str], dict[str, float]] = {}
    loads: dict[str, dict[str, float]] = {}
    machine: dict[str, float] = {}
    names: dict[str, str] = {}
    for family in families:
        for sample in family.samples:
            if key := _OP_METRICS.get(sample.name):
                ops.setdefault((sample.labels["op"], sample.labels["phase"]), {})[key] = sample.value
            elif key := _LOAD_METRICS.get(sample.name):
                loads.setdefault(sample.labels["phase"], {})[key] = sample.value
            elif key := _MACHINE_METRICS.get(sample.name):
                machine[key] = sample.value
            elif sample.name == "headrace_roofline_info":
                names = sample.labels
    return Reading(
        address,
        _machine(names, machine) if names else None,
        {key: OpSums(**sums) for key, sums in ops.items()},
        {phase: PhaseLoad(**sums) for phase, sums in loads.items()},
    )


def _machine(names: Mapping[str, str], figures: Mapping[str, float]) -> Machine:
    dtype = Dtype(names["dtype"])
    # A worker of an earlier version has the one type for all.
    kv_dtype = Dtype(names.get("kv_dtype", dtype.activation.value))
    return Machine(names["hardware"], names["model"], dtype, kv_dtype, **figures)


def live_rows(reading: Reading) -> Iterator[LiveRow]:
    """Yield a worker's operations, phase by phase, the longest first."""
    for phase, load in sorted(reading.loads.items()):
        sums = {op: sums for (op, of), sums in reading.ops.items() if of == phase}
        step_s = sum(one.measured_s for one in sums.values())
        for op, one in sorted(sums.items(), key=lambda item: -item[1].measured_s):
            is_known = one.predicted_s > 0
            yield LiveRow(
                phase, op,
                measured_us=one.measured_s / load.num_steps * 1e6,
                predicted_us=one.predicted_s / load.num_steps * 1e6 if is_known else None,
                ratio=one.measured_s / one.predicted_s if is_known else None,
                share=one.measured_s / step_s if step_s else 0.0,
                bound=_bound(one, reading.machine) if is_known and reading.machine else "",
                num_bytes=one.num_bytes / load.num_steps,
                flops=one.flops / load.num_steps,
            )  # fmt: skip


def _bound(sums: OpSums, machine: Machine) -> str:
    """Return what limits the prediction: the slower resource, or starting the operation if that takes longer yet."""
    seconds = {"compute": sums.flops / machine.flops_per_s, "memory": sums.num_bytes / machine.bytes_per_s}
    slowest = max(seconds, key=lambda bound: seconds[bound])
    return "overhead" if sums.predicted_s > 2 * seconds[slowest] else slowest


def measured_points(readings: Sequence[Reading], shape: ModelShape) -> MeasuredPoints:
    """Return the workers' operations as points for the page, of a mean step of all; mixed steps are left out.

    What was measured as one is split as the roofline splits it, so that its parts all reach the same part of the roof.

    Raises:
        LiveError: A worker runs another model.
        NothingMeasuredError: None has measured a step.
    """
    points: list[MeasuredPoint] = []
    for phase in PHASES:
        for reading in readings:
            if reading.machine and reading.machine.model != shape.name:
                raise LiveError(f"{reading.address} runs {reading.machine.model}, not {shape.name}: give its --model")
        having = [one for one in readings if one.machine and phase in one.loads]
        if having:
            points += _points(_total(having), phase, shape)
    if not points:
        text = "no prefill or decode step was measured yet; a worker measures one in --roofline-every-steps of them"
        raise NothingMeasuredError(text)
    source = ", ".join(f"{one.machine.hardware} at {one.address}" for one in readings if one.machine)
    return MeasuredPoints(source=f"mean of measured steps on {source}", points=points)


def mean_load(readings: Sequence[Reading], phase: Phase) -> tuple[int, int] | None:
    """Return sequences of a mean measured step and tokens of a sequence; None if no step of `phase` was measured."""
    loads = [reading.loads[phase] for reading in readings if phase in reading.loads]
    steps, sequences, tokens = (
        sum(values) for values in zip(*((0.0, 0.0, 0.0), *(astuple(load) for load in loads)), strict=True)
    )
    return (max(1, round(sequences / steps)), max(1, round(tokens / sequences))) if steps else None


def _total(readings: Sequence[Reading]) -> Reading:
    ops: dict[tuple[str, str], OpSums] = {}
    loads: dict[str, PhaseLoad] = {}
    for reading in readings:
        ops |= {key: _plus(sums, ops.get(key, OpSums())) for key, sums in reading.ops.items()}
        loads |= {phase: _plus(load, loads.get(phase, PhaseLoad())) for phase, load in reading.loads.items()}
    return Reading(readings[0].address, readings[0].machine, ops, loads)


def _points(reading: Reading, phase: Phase, shape: ModelShape) -> Iterator[MeasuredPoint]:
    load = mean_load([reading], phase)
    assert reading.machine, "only readings that have one"
    assert load, "only readings with steps of this phase"
    (batch, context), machine = load, reading.machine
    rows = roofline(
        shape, machine.as_hardware(), phase=phase, batch=batch, context=context, dtype=machine.dtype,
        kv_dtype=machine.kv_dtype,
    ).operations  # fmt: skip
    for row in live_rows(reading):
        parts = [part for part in rows if part.name in row.op.split("+")]
        if row.phase != phase or row.ratio is None or not parts:
            continue
        times, sizes, flops = (
            _shares(values)
            for values in (
                [part.time_s for part in parts],
                [part.operation.bytes for part in parts],
                [part.operation.flops for part in parts],
            )
        )
        for part, time_share, bytes_share, flops_share in zip(parts, times, sizes, flops, strict=True):
            yield MeasuredPoint(
                phase=phase, operation=part.name, seconds=row.measured_us * 1e-6 * time_share,
                bytes=row.num_bytes * bytes_share or None, flops=row.flops * flops_share or None,
            )  # fmt: skip


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 0.0 for value in values]
