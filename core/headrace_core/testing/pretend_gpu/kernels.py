"""Launches of Triton kernels, which its interpreter runs (TRITON_INTERPRET=1 before the kernels are imported)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from headrace_core.testing.pretend_gpu import graph, journal
from headrace_core.testing.pretend_gpu.launches import on_host
from headrace_core.testing.pretend_gpu.tensor import GpuTensor
from headrace_core.testing.pretend_gpu.trees import tensors_of


@contextmanager
def kernels_on_gpu() -> Generator[None]:
    """Let kernels take tensors of the pretended GPU, and as on a real one no others."""
    # Only where there is something to interpret: on a machine without triton nothing launches kernels.
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        for place, tensor in enumerate(tensors_of((args, kwargs))):
            if not isinstance(tensor, GpuTensor):
                name, where = executor.fn.__name__, tensor.device
                raise ValueError(f"{name}: pointer argument {place} cannot be accessed from Triton: it is on {where}")
        host_args, host_kwargs = on_host((args, kwargs))

        def launched() -> None:
            run(executor, *host_args, **host_kwargs)

        if not graph.keep(launched):
            journal.note_launch(executor.fn.__name__)
            with graph.plain_torch():
                launched()

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield
