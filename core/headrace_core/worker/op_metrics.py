"""Measured steps beside what the roofline predicts for the very same ones: `headrace_op_*`, by operation and phase.

The engine thread only measures. A thread of this module predicts, half a millisecond a step, and before its first
prediction measures the machine; until that is done, measured steps wait.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace_core.batch.step import StepTiming
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.roofline.step_load import StepLoad

log = logging.getLogger(__name__)

ExpertCounts = Mapping[int, list[int]]


@dataclass(slots=True)
class OpTotals:
    """Sums of one operation over measured steps; bytes and FLOPs are predicted, as nobody measures them."""

    measured_s: float = 0.0
    predicted_s: float = 0.0
    num_bytes: float = 0.0
    flops: float = 0.0


_FAMILIES: tuple[tuple[str, str, Callable[[OpTotals], float]], ...] = (
    ("headrace_op_measured_seconds", "Seconds of an operation in measured steps", lambda totals: totals.measured_s),
    ("headrace_op_predicted_seconds", "Seconds that the roofline predicts", lambda totals: totals.predicted_s),
    ("headrace_op_bytes", "Bytes that an operation moves, by the roofline", lambda totals: totals.num_bytes),
    ("headrace_op_flops", "FLOPs of an operation, by the roofline", lambda totals: totals.flops),
)
_LOADS = (
    ("headrace_op_sampled_steps", "Steps measured"),
    ("headrace_op_sampled_sequences", "Sequences in measured steps"),
    ("headrace_op_sampled_context_tokens", "Tokens that these sequences had, those of the step included"),
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What predicts a worker's steps. `hardware` is called once, on a thread of its own; it may take a while.

    `dtype` is that of weights and compute, `kv_dtype` that of cached values, None: the same.
    """

    shape: ModelShape
    dtype: Dtype
    hardware: Callable[[], Hardware]
    kv_dtype: Dtype | None = None

    def predict(self, hardware: Hardware, load: StepLoad, expert_counts: ExpertCounts) -> Roofline:
        """Return the roofline of one step, with the experts that its tokens did choose."""
        hits = [sum(count > 0 for count in counts) for counts in expert_counts.values()]
        experts_read = sum(hits) / len(hits) if hits else None
        return predict_step(
            self.shape, hardware, load, dtype=self.dtype, kv_dtype=self.kv_dtype, experts_read=experts_read
        )


def phase_of(load: StepLoad) -> str:
    """Return `prefill`, `decode`, or `mixed` for a step that has both."""
    if load.prefill_tokens and load.decode_tokens:
        return "mixed"
    return "prefill" if load.prefill_tokens else "decode"


class OpMetrics(Collector):
    """The collector. `add` on the event loop, `collect` on the registry's thread; `close` ends its own."""

    def __init__(self, prediction: Prediction) -> None:
        self._prediction = prediction
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="roofline")
        self._lock = threading.Lock()
        self._totals: defaultdict[tuple[str, str], OpTotals] = defaultdict(OpTotals)
        self._loads: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(_LOADS))
        self._hardware: Future[Hardware] = self._thread.submit(prediction.hardware)
        self._hardware.add_done_callback(_log_hardware)

    def add(self, timing: StepTiming, expert_counts: ExpertCounts) -> None:
        """Predict a measured step and count it, soon."""
        if not self._has_failed():
            self._thread.submit(self._add, timing, expert_counts).add_done_callback(_log_failure)

    def drain(self) -> None:
        """Return when all that was added is counted; for tests."""
        self._thread.submit(int).result()

    def close(self) -> None:
        """Drop what waits; the thread ends when it has finished what it does."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def collect(self) -> Iterator[Metric]:
        """Yield the samples; called by the registry, on its own thread."""
        with self._lock:
            totals = {key: replace(total) for key, total in self._totals.items()}
            loads = {phase: list(sums) for phase, sums in self._loads.items()}
        for name, text, value in _FAMILIES:
            family = CounterMetricFamily(name, text, labels=["op", "phase"])
            for labels, total in totals.items():
                family.add_metric(labels, value(total))
            yield family
        for i, (name, text) in enumerate(_LOADS):
            family = CounterMetricFamily(name, text, labels=["phase"])
            for phase, sums in loads.items():
                family.add_metric([phase], sums[i])
            yield family
        if self._hardware.done() and not self._has_failed():
            yield from _hardware_metrics(self._prediction, self._hardware.result())

    def _has_failed(self) -> bool:
        """True if there is no machine to predict for; said in the log, once."""
        return self._hardware.done() and (self._hardware.cancelled() or self._hardware.exception() is not None)

    def _add(self, timing: StepTiming, expert_counts: ExpertCounts) -> None:
        predicted = self._prediction.predict(self._hardware.result(), timing.load, expert_counts)
        rows = {row.name: row for row in predicted.operations}
        load, phase = timing.load, phase_of(timing.load)
        sizes = (1, load.num_sequences, load.prefill_context + load.decode_context)
        with self._lock:
            self._loads[phase] = [a + b for a, b in zip(self._loads[phase], sizes, strict=True)]
            for op, seconds in timing.op_seconds.items():
                totals = self._totals[op, phase]
                totals.measured_s += seconds
                for row in (rows[part] for part in op.split("+") if part in rows):
                    totals.predicted_s += row.time_s
                    totals.num_bytes += row.operation.bytes
                    totals.flops += row.operation.flops


def _hardware_metrics(prediction: Prediction, hardware: Hardware) -> Iterator[Metric]:
    kv_dtype = prediction.kv_dtype or prediction.dtype.activation
    info = {
        "hardware": hardware.name, "model": prediction.shape.name, "dtype": prediction.dtype.value,
        "kv_dtype": kv_dtype.value,
    }  # fmt: skip
    yield InfoMetricFamily("headrace_roofline", "What the roofline predicts for", info)
    for name, text, value in (
        ("headrace_roofline_flops_per_second", "Peak in the model's type", hardware.flops_per_s(prediction.dtype)),
        ("headrace_roofline_bytes_per_second", "Memory bandwidth", hardware.memory_bytes_per_s),
        ("headrace_roofline_op_overhead_seconds", "Cost of starting an operation", hardware.operation_overhead_s),
    ):
        yield GaugeMetricFamily(name, text, value)


def _log_hardware(future: Future[Hardware]) -> None:
    _log_failure(future)
    if not future.cancelled() and not future.exception():
        log.info("roofline ready", extra={"hardware": future.result().name, "source": future.result().source})


def _log_failure(future: Future[Hardware] | Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()):
        log.error("roofline failed", exc_info=error)
