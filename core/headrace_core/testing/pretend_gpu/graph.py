"""CUDA graphs: what is launched inside a capture is kept, not run; a replay runs it, on the same memory.

As on a GPU, a capture computes nothing. What it allocates holds NaN and -1 until the first replay, what it would write
stays as it was, and what the host would have to know (a value, a size that depends on one) raises `CaptureError`. So a
number that the host worked out while it captured is the same in every replay; a test that replays with other inputs
shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from headrace_core.testing.pretend_gpu import journal


class CaptureError(RuntimeError):
    """Something that no CUDA graph can hold was done inside a capture."""


_capture: list[Callable[[], object]] | None = None


def is_capturing() -> bool:
    """In place of `torch.cuda.is_current_stream_capturing`."""
    return _capture is not None


def keep(run: Callable[[], object]) -> bool:
    """Inside a capture, keep `run` for the replays; say whether it was."""
    if _capture is None:
        return False
    _capture.append(run)
    return True


def submit(run: Callable[[], object]) -> None:
    """Keep `run` for the replays inside a capture, else call it."""
    if not keep(run):
        run()


def refuse_in_capture(what: str) -> None:
    """Raise CaptureError inside a capture."""
    if _capture is not None:
        raise CaptureError(f"{what} inside a capture of a CUDA graph, at {journal.place()}: no graph can hold that")


@contextmanager
def plain_torch() -> Generator[None]:
    """Let torch on this thread know of no pretended device."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class CudaGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._launches: list[Callable[[], object]] | None = None

    def replay(self) -> None:
        """Run what was captured.

        Raises:
            RuntimeError: nothing was.
            CaptureError: inside a capture.
        """
        refuse_in_capture("a replay of another graph")
        if self._launches is None:
            raise RuntimeError("replay of a CUDA graph into which nothing was captured")
        journal.note_launch("graph")
        with plain_torch():
            for run in self._launches:
                run()

    def reset(self) -> None:
        """Forget what was captured."""
        self._launches = None

    @contextmanager
    def capturing(self) -> Generator[None]:
        """Keep what is launched inside; of a capture that fails, nothing."""
        global _capture
        refuse_in_capture("a capture of another graph")
        self._launches = None
        launches = _capture = []
        try:
            yield
            self._launches = launches
        finally:
            _capture = None


@contextmanager
def graph(cuda_graph: CudaGraph, pool: object = None, stream: object = None, **_options: object) -> Generator[None]:
    """In place of `torch.cuda.graph`: a capture's memory and stream make no difference here."""
    with cuda_graph.capturing():
        yield
