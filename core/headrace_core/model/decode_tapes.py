"""Decode steps on a CPU: recorded the first time that so many sequences take one together, replayed from then on.

The same as captured steps on a GPU (`decode_graphs`): inputs lie in buffers that stay where they are, and the network's
calls are made again without the network's Python. Rows cost a CPU time, so none are padded, and every number of them
has a recording of its own, a few hundred bytes a call; what they work on lies in one memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace_kernels.cpu.arena import Arena
from headrace_kernels.cpu.tape import Tape, record

from headrace_core.batch.step import Chunk
from headrace_core.model.decode_batch import DecodeBatch, DecodeBatchBuffers
from headrace_core.model.decode_graphs import DecodeOutput
from headrace_core.model.op_timer import OFF, OTHER, OpTimer

Forward = Callable[[DecodeBatch, OpTimer], DecodeOutput]


class DecodeTapes:
    """Recorded decode steps of up to `max_rows` sequences. Engine thread only.

    `problem` says why steps can't be recorded, once one was tried; `max_rows` is 0 then, and steps are for others.
    """

    def __init__(self, forward: Forward, *, max_rows: int, max_pages: int, page_size: int) -> None:
        self.max_rows = max_rows
        self.problem: str | None = None
        self._forward = forward
        self._inputs = DecodeBatchBuffers(num_rows=max_rows, max_pages=max_pages, page_size=page_size, device="cpu")
        self._arena = Arena()
        self._tapes: dict[int, tuple[Tape, DecodeOutput]] = {}

    def run(self, chunks: Sequence[Chunk], timer: OpTimer = OFF) -> DecodeOutput:
        """Compute a decode step; see `is_decode_step`. Return its output, valid until the next run.

        Raises:
            ValueError: more chunks than `max_rows`, or a chunk's pages do not cover it.
        """
        num_rows = len(chunks)
        if num_rows > self.max_rows:
            raise ValueError(f"{num_rows} sequences are more than the {self.max_rows} that there are buffers for")
        self._inputs.load(chunks, num_rows)
        timer.mark(OTHER)
        known = self._tapes.get(num_rows)
        if known is None:
            return self._record(num_rows, timer)
        tape, output = known
        tape.replay(None if timer is OFF else timer.mark)
        return output

    def _record(self, num_rows: int, timer: OpTimer) -> DecodeOutput:
        batch = self._inputs.device.first(num_rows)
        output, tape = record(lambda tape: self._forward(batch, _BothMarks(tape, timer)), self._arena)
        if tape.problem is None:
            self._tapes[num_rows] = tape, output
        else:
            self.problem, self.max_rows = tape.problem, 0
        return output


class _BothMarks(OpTimer):
    """Tells a tape what it tells a timer."""

    __slots__ = ("_tape", "_timer")

    def __init__(self, tape: Tape, timer: OpTimer) -> None:
        self._tape, self._timer = tape, timer

    def mark(self, op: str) -> None:
        self._tape.mark(op)
        self._timer.mark(op)
