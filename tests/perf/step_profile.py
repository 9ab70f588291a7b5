"""`make profile`: where a step's time goes, operation by operation, beside its floor and by the kernels' own counters.

    python -m tests.perf.step_profile build/checkpoint-280m --decode 16 --prefill 512

Operations are those that the network marks (`headrace_core.model.op_timer`), so their times add up to the step's.
Beside each stand its floor (the roofline's, at what this machine reads and multiplies now, with the experts that this
step's tokens did choose), how much of the time was inside compiled kernels (the rest is Python and torch around them),
and how busy the threads were in there (the rest is waiting for each other). Medians of several steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from headrace_core.batch.step import Chunk, step_load
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.op_timer import OTHER, SAMPLING, RunningOpTimer
from headrace_core.model.sampler import sample
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import ModelShape
from headrace_core.roofline.roofline import predict_step
from headrace_core.testing.paged_sequences import PagedSequences, greedy_plan
from headrace_kernels.cpu.library import counters
from rich import box
from rich.console import Console
from rich.table import Table

from tests.perf.engine.hardware import measured_hardware
from tests.perf.machine import machine
from tests.perf.model_bench import CHUNK_TOKENS, PAGE_SIZE, random_prompts, record_decode

_BAR_WIDTH = 20
_LEAST_WIDTH = 112
_WARM_UP_STEPS = 2
_COLUMNS = ("operation", "ms", "share", "of the step", "floor ms", "× floor", "kernels", "busy", "calls")


@dataclass
class Row:
    """One operation of a step, or of the steps that a prompt takes."""

    op: str
    ms: float
    floor_ms: float | None
    kernel_ms: float
    busy_ms: float
    calls: int

    def ratio(self) -> float | None:
        """Return by how much it exceeds its floor; None: there is none."""
        return self.ms / self.floor_ms if self.floor_ms else None


class CountingOpTimer(RunningOpTimer):
    """Keeps the kernels' counters by operation as well: `kernels` has calls, nanoseconds in them, and busy ones."""

    __slots__ = ("_last", "kernels")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._last = counters()

    def mark(self, op: str) -> None:
        """See `OpTimer`."""
        super().mark(op)
        now = counters()
        new = now.since(self._last)
        self._last = now
        for i, value in enumerate((new.calls, new.call_ns, new.busy_ns)):
            self.kernels[op][i] += value


class Profile:
    """A model over pages, and what steps of it take."""

    def __init__(self, checkpoint: Path, hardware: Hardware, num_pages: int) -> None:
        self._model: Model = load_model(checkpoint)
        self._shape, self._hardware = ModelShape.load(checkpoint), hardware
        self._sequences = PagedSequences(self._model, page_size=PAGE_SIZE, num_pages=num_pages, is_poisoned=False)
        record_decode(self._model, self._sequences.cache)

    def decode(self, batch: int, context: int, steps: int) -> list[Row]:
        """Return the operations of a decode step of `batch` sequences behind `context` tokens."""
        prompts = random_prompts(batch, context, self._shape.vocab_size)
        self._start(prompts)
        return self._rows(lambda: [[self._sequences.chunk(i, [each[0]]) for i, each in enumerate(prompts)]], steps)

    def prefill(self, length: int, steps: int) -> list[Row]:
        """Return the operations of a prompt, over all chunks of it."""
        (prompt,) = random_prompts(1, length, self._shape.vocab_size)

        def chunks() -> list[list[Chunk]]:
            self._sequences.free_all()
            firsts = range(0, length, CHUNK_TOKENS)
            return [[self._sequences.chunk(0, prompt[i : i + CHUNK_TOKENS])] for i in firsts]

        return self._rows(chunks, steps)

    def _start(self, prompts: Sequence[list[int]]) -> None:
        self._sequences.free_all()
        for key, prompt in enumerate(prompts):
            self._step([self._sequences.chunk(key, prompt)])

    def _rows(self, next_steps: Callable[[], list[list[Chunk]]], times: int) -> list[Row]:
        found: list[dict[str, Row]] = []
        for number in range(_WARM_UP_STEPS + times):
            total: dict[str, Row] = {}
            for chunks in next_steps():
                for row in self._step(chunks):
                    total[row.op] = _sum(total[row.op], row) if row.op in total else row
            if number >= _WARM_UP_STEPS:
                found.append(total)
        return sorted((_median([each[op] for each in found]) for op in found[0]), key=lambda row: -row.ms)

    def _step(self, chunks: list[Chunk]) -> list[Row]:
        self._model.take_expert_counts()
        with torch.inference_mode():
            timer = CountingOpTimer()
            timer.mark(OTHER)
            logits = self._model.forward(chunks, self._sequences.cache, timer)
            sample(logits, list(greedy_plan(chunks).sampling.values()))
            timer.mark(SAMPLING)
        floors = self._floors(chunks)
        rows: list[Row] = []
        for op, seconds in timer.seconds.items():
            known = [floors[part] for part in op.split("+") if part in floors]
            calls, call_ns, busy_ns = timer.kernels[op]
            rows.append(Row(op, seconds * 1e3, sum(known) if known else None, call_ns / 1e6, busy_ns / 1e6, calls))
        return rows

    def _floors(self, chunks: Sequence[Chunk]) -> dict[str, float]:
        hits = [sum(count > 0 for count in counts) for counts in self._model.take_expert_counts().values()]
        read = statistics.mean(hits) if hits else None
        predicted = predict_step(self._shape, self._hardware, step_load(chunks), experts_read=read)
        return {row.name: row.time_s * 1e3 for row in predicted.operations if not row.operation.is_overlapped}


def _sum(a: Row, b: Row) -> Row:
    floor_ms = None if a.floor_ms is None or b.floor_ms is None else a.floor_ms + b.floor_ms
    return Row(a.op, a.ms + b.ms, floor_ms, a.kernel_ms + b.kernel_ms, a.busy_ms + b.busy_ms, a.calls + b.calls)


def _median(rows: Sequence[Row]) -> Row:
    def middle(name: str) -> float:
        return statistics.median(getattr(row, name) for row in rows)

    floor_ms = None if rows[0].floor_ms is None else middle("floor_ms")
    return Row(rows[0].op, middle("ms"), floor_ms, middle("kernel_ms"), middle("busy_ms"), rows[0].calls)


def total(rows: Sequence[Row]) -> Row:
    """Return the whole step; operations without a floor add nothing to its floor."""
    floor_ms = sum(row.floor_ms or 0.0 for row in rows)
    sums = [sum(getattr(row, name) for row in rows) for name in ("kernel_ms", "busy_ms")]
    return Row("step", sum(row.ms for row in rows), floor_ms, *sums, sum(row.calls for row in rows))


def show(console: Console, title: str, rows: Sequence[Row], threads: int) -> None:
    """Print a table. A bar is an operation's share of the step, the light part of it what is over the floor.

    "kernels" is the share of the time in compiled kernels, "busy" that of the threads' time in those that they worked.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in _COLUMNS:
        is_text = column in ("operation", "of the step")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "operation")
    whole = total(rows)
    for row in (*rows, whole):
        ratio = row.ratio()
        if row is whole:
            table.add_section()
        table.add_row(
            row.op.replace("+", " + "), f"{row.ms:.2f}", f"{row.ms / whole.ms:.0%}", _bar(row, whole.ms),
            "" if row.floor_ms is None else f"{row.floor_ms:.2f}", "" if ratio is None else f"{ratio:.1f}",
            f"{row.kernel_ms / row.ms:.0%}", f"{row.busy_ms / row.kernel_ms / threads:.0%}" if row.kernel_ms else "",
            str(row.calls),
        )  # fmt: skip
    console.print(table)


def _bar(row: Row, step_ms: float) -> str:
    width = round(_BAR_WIDTH * row.ms / step_ms)
    solid = min(width, round(_BAR_WIDTH * (row.floor_ms or 0.0) / step_ms))
    return "█" * solid + "░" * (width - solid)


def _main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 16], help="batches of decode steps")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence before a decode step")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], help="lengths of prompts")
    parser.add_argument("--steps", type=int, default=12, help="of which the medians are shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    most_steps = options.steps + _WARM_UP_STEPS + 1
    tokens = [batch * (options.context + most_steps + PAGE_SIZE) for batch in options.decode]
    hardware = measured_hardware(options.threads)
    profile = Profile(options.checkpoint, hardware, -(-max([*tokens, *options.prefill]) // PAGE_SIZE) + 1)
    found: dict[str, list[Row]] = {}
    for batch in options.decode:
        found[f"decode, batch {batch}, context {options.context}"] = profile.decode(
            batch, options.context, options.steps
        )
    for length in options.prefill:
        found[f"prefill, {length} tokens"] = profile.prefill(length, options.steps)
    if options.json:
        sys.stdout.write(json.dumps(_as_json(found, hardware, options.threads), indent=1) + "\n")
        return
    # No narrower: then figures would be cut.
    console = Console(width=max(Console().width, _LEAST_WIDTH))
    for title, rows in found.items():
        show(console, title, rows, options.threads)


def _as_json(found: dict[str, list[Row]], hardware: Hardware, threads: int) -> dict[str, Any]:
    steps = {
        title: {"total": asdict(total(rows)), "rows": [asdict(row) for row in rows]} for title, rows in found.items()
    }
    return {
        "machine": machine(),
        "threads": threads,
        "read_gb_per_s": round(hardware.memory_bytes_per_s / 1e9, 1),
        "gflop_per_s": round(max(hardware.flops.values()) / 1e9),
        "steps": steps,
    }


if __name__ == "__main__":
    _main()
