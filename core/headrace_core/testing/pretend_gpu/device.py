"""Put the pretended GPU in force: what `torch.cuda` says, what a thread's torch does, what Triton launches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from headrace_core.testing.pretend_gpu import graph, streams, under_way
from headrace_core.testing.pretend_gpu.kernels import kernels_on_gpu
from headrace_core.testing.pretend_gpu.operations import Functions, Operations
from headrace_core.testing.pretend_gpu.tensor import DEVICE

_NAME = "pretended on a CPU"
_MEMORY_BYTES = 80 << 30
_PROPERTIES = SimpleNamespace(
    name=_NAME, multi_processor_count=4, L2_cache_size=50 << 20, total_memory=_MEMORY_BYTES, major=9, minor=0
)


class GpuGenerator(torch.Generator):
    """In place of `torch.Generator`: one of the GPU draws the CPU's numbers."""

    is_gpu: bool

    def __new__(cls, device: Any = "cpu") -> GpuGenerator:
        """Return a generator that says `device`."""
        generator = super().__new__(cls)
        generator.is_gpu = torch.device(device).type == "cuda"
        return generator

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where it draws."""
        return DEVICE if self.is_gpu else torch.device("cpu")


def _always(value: object) -> Callable[..., Any]:
    def answer(*_args: object, **_options: object) -> object:
        return value

    return answer


def _cuda() -> dict[str, Any]:
    """Return what stands in place of `torch.cuda`'s."""
    return {
        "_lazy_init": _always(None),
        "is_available": _always(True),
        "device_count": _always(1),
        "current_device": _always(0),
        "get_device_name": _always(_NAME),
        "get_device_capability": _always((_PROPERTIES.major, _PROPERTIES.minor)),
        "get_device_properties": _always(_PROPERTIES),
        "mem_get_info": _always((_MEMORY_BYTES, _MEMORY_BYTES)),
        "empty_cache": _always(None),
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.stream,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "synchronize": streams.synchronize,
        "CUDAGraph": graph.CudaGraph,
        "graph": graph.graph,
        "graph_pool_handle": _always((0, 0)),
        "is_current_stream_capturing": graph.is_capturing,
    }


@contextmanager
def pretend_gpu() -> Generator[None]:
    """Let there be one GPU, on this thread and those started inside, until the end; inside another, nothing new.

    Raises:
        UnderWayError: at the end, memory was written to while a copy from it was under way.
    """
    if torch.cuda.graph is graph.graph:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_cuda()))
        stack.enter_context(mock.patch.object(torch, "Generator", GpuGenerator))
        stack.enter_context(kernels_on_gpu())
        stack.enter_context(_on_new_threads())
        stack.callback(under_way.forget)
        with _on_this_thread():
            yield
            under_way.finish()


@contextmanager
def _on_this_thread() -> Generator[None]:
    functions = Functions()
    with functions, Operations(functions):
        yield


@contextmanager
def _on_new_threads() -> Generator[None]:
    run = threading.Thread.run

    def run_with_gpu(thread: threading.Thread) -> None:
        with _on_this_thread():
            run(thread)

    with mock.patch.object(threading.Thread, "run", run_with_gpu):
        yield
