"""Decode steps of fixed shape: inputs in fixed buffers, launches captured once and replayed (CUDA graphs).

A step in which every sequence computes one token is the same series of launches whoever is in it. So its inputs are
copied to buffers that stay where they are, the number of rows is padded to one of few (a bucket), and each bucket's
launches are captured when the worker starts. What the host does in a step is one copy of what is new and one replay.

A row of padding repeats row 0 but writes nothing and chooses no expert (slot -1): it reads what row 0 reads anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.model.decode_batch import DecodeBatch, DecodeBatchBuffers
from headrace_core.model.op_timer import OFF, OpTimer

_EXACT_BUCKETS = (1, 2, 4)
_BUCKET_STEP = 8


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """`hidden` [B, N]: what whoever made it says; `experts` [mixture layers, B, K], None: they are not told.

    `logits` [B, V] float32; None for layers without a head.
    """

    hidden: Tensor
    experts: Tensor | None
    logits: Tensor | None = None

    def first(self, num_rows: int) -> DecodeOutput:
        """Return views of the first rows."""
        experts = None if self.experts is None else self.experts[:, :num_rows]
        logits = None if self.logits is None else self.logits[:num_rows]
        return DecodeOutput(self.hidden[:num_rows], experts, logits)

    def copy_(self, other: DecodeOutput) -> None:
        """Take the values of `other`, an output for as many rows."""
        self.hidden.copy_(other.hidden)
        if self.logits is not None and other.logits is not None:
            self.logits.copy_(other.logits)
        if self.experts is not None and other.experts is not None:
            self.experts.copy_(other.experts)


Capture = Callable[[Callable[[], DecodeOutput]], Callable[[], DecodeOutput]]
"""Takes a function that launches and returns its output; returns one that launches the same into the same output."""


def is_decode_step(chunks: Sequence[Chunk]) -> bool:
    """True when every chunk computes one token behind others and samples from it."""
    return all(chunk.start > 0 and len(chunk.token_ids) == 1 and chunk.is_sampled for chunk in chunks)


def buckets(max_rows: int) -> list[int]:
    """Return the numbers of rows that steps are padded to, ascending; the last is at least `max_rows`."""
    small = [rows for rows in _EXACT_BUCKETS if rows < max_rows]
    return [*small, *range(_BUCKET_STEP, max_rows + _BUCKET_STEP, _BUCKET_STEP)] if max_rows > 4 else [*small, max_rows]


class DecodeGraphs:
    """One captured decode step a bucket, for up to `max_rows` sequences. Engine thread only, but to construct it."""

    def __init__(
        self,
        forward: Callable[[DecodeBatch], DecodeOutput],
        *,
        max_rows: int,
        max_pages: int,
        page_size: int,
        device: str,
        capture: Capture | None = None,
    ) -> None:
        """Capture `forward` for every bucket, the largest first: they share its memory.

        Capturing runs each once, on token 0 at position 0, reading page 0 and writing nothing. `capture` None: CUDA
        graphs.
        """
        self.max_rows = max_rows
        self._inputs = DecodeBatchBuffers(
            num_rows=buckets(max_rows)[-1], max_pages=max_pages, page_size=page_size, device=device
        )
        self._replays: dict[int, Callable[[], DecodeOutput]] = {}
        capture = capture or CudaGraphCapture()
        for num_rows in reversed(buckets(max_rows)):
            batch = self._inputs.device.first(num_rows)
            self._replays[num_rows] = capture(lambda batch=batch: forward(batch))

    def run(self, chunks: Sequence[Chunk], timer: OpTimer = OFF) -> DecodeOutput:
        """Compute a decode step; see `is_decode_step`. Return its output, valid until the next run.

        `timer` is told nothing: launches are all that could be measured.

        Raises:
            ValueError: more chunks than the largest bucket, or a chunk's pages do not cover it.
        """
        num_rows = next((rows for rows in sorted(self._replays) if rows >= len(chunks)), 0)
        if not num_rows:
            raise ValueError(
                f"{len(chunks)} sequences are more than the {max(self._replays)} that steps were captured for"
            )
        self._inputs.load(chunks, num_rows)
        return self._replays[num_rows]().first(len(chunks))


class CudaGraphCapture:
    """`Capture` by CUDA graphs that share one pool of memory and the memory of one output, the first batch's.

    So no batch may be larger than the first. Outputs of their own would stay in the pool, one a graph.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._out: DecodeOutput | None = None

    def __call__(self, run: Callable[[], DecodeOutput]) -> Callable[[], DecodeOutput]:
        """Run once, which compiles kernels and sizes workspaces, then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = run()
        torch.cuda.current_stream().wait_stream(stream)
        if self._out is None:
            experts = None if found.experts is None else torch.empty_like(found.experts)
            logits = None if found.logits is None else torch.empty_like(found.logits)
            self._out = DecodeOutput(torch.empty_like(found.hidden), experts, logits)
        out = self._out.first(len(found.hidden))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out.copy_(run())

        def replay() -> DecodeOutput:
            graph.replay()
            return out

        return replay
