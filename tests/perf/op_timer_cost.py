"""What measuring operations costs a decode step of the demo model: `python -m tests.perf.op_timer_cost`.

Steps that are measured alternate with steps that are not, and medians are compared, so that what else the machine does
hits both alike. What the marks cost a step that is not measured is too little to be seen that way: it is their number
times the time of one.
"""

from __future__ import annotations

import statistics
import timeit
from pathlib import Path

import torch
from headrace_core.engine.executor import Executor
from headrace_core.model.load import load_model
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.testing.paged_sequences import PagedSequences, greedy_plan

_ROOT = Path(__file__).parents[2]
_NUM_PAIRS = 400
_NUM_SEQUENCES = 8


class _CountingTimer(OpTimer):
    num_marks = 0

    def mark(self, op: str) -> None:
        self.num_marks += 1


def main() -> None:
    """Print the cost of both kinds of step."""
    torch.set_num_threads(1)
    model = load_model(_ROOT / "demo" / "model")
    sequences = PagedSequences(model, page_size=16, num_pages=_NUM_SEQUENCES * (2 * _NUM_PAIRS + 200) // 16)
    run = Executor(model, sequences.cache, timing_period=2)
    run.step(greedy_plan([sequences.chunk(key, range(3, 103)) for key in range(_NUM_SEQUENCES)]))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2 * _NUM_PAIRS):
        result = run.step(greedy_plan([sequences.chunk(key, [5]) for key in range(_NUM_SEQUENCES)]))
        seconds[result.timing is not None].append(result.duration_s)
    off_s, on_s = statistics.median(seconds[False]), statistics.median(seconds[True])
    counting = _CountingTimer()
    model.forward([sequences.chunk(0, [5])], sequences.cache, counting)
    mark_s = min(timeit.repeat(lambda: OFF.mark("head"), number=100_000, repeat=7)) / 100_000
    idle_s = mark_s * counting.num_marks
    print(f"step of {_NUM_SEQUENCES} sequences: {off_s * 1e6:.0f} us not measured, {on_s * 1e6:.0f} us measured")  # noqa: T201
    print(f"{counting.num_marks} marks that measure nothing: {idle_s * 1e6:.2f} us, {idle_s / off_s:.3%}")  # noqa: T201


if __name__ == "__main__":
    main()
