"""Copies between host and device, and which of them the host waits for.

As torch does on a GPU: it waits unless it is told not to (`non_blocking`). A copy that it does not wait for is under
way (`under_way`) if the host's memory is pinned and in one piece. What is in pieces goes through memory that torch
takes for it, which is not pinned; what is not pinned goes to the device through the driver's own memory, and to the
host before the host goes on. Of copies between the two, a graph holds only those that will be under way.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from headrace_core.testing.pretend_gpu import graph, journal, under_way
from headrace_core.testing.pretend_gpu.launches import launch
from headrace_core.testing.pretend_gpu.memory import is_pinned, pin
from headrace_core.testing.pretend_gpu.streams import current_stream
from headrace_core.testing.pretend_gpu.tensor import GpuTensor


def to_copy(func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """`aten::_to_copy` from one to the other."""
    non_blocking = kwargs.pop("non_blocking", False)
    if not isinstance(source, GpuTensor):
        to_device(source, non_blocking=non_blocking)
        if graph.is_capturing():
            return launch(func, (source,), kwargs, is_to_gpu=True)
        return GpuTensor(func(source, **{**kwargs, "device": "cpu"}))
    graph.refuse_in_capture("a copy to new memory of the host")
    value: Tensor = func(source.on_host, **{**kwargs, "device": "cpu"})
    # torch pins the new memory if it need not wait.
    host = pin(value.clone()) if non_blocking else value
    _to_host(host, value, non_blocking=non_blocking)
    return host


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten::copy_` from one to the other."""
    is_whole = target.shape == source.shape
    if isinstance(target, GpuTensor):
        to_device(source, non_blocking=non_blocking, is_whole=is_whole)
        on_device = target.on_host
        graph.submit(lambda: on_device.copy_(source))
    else:
        assert isinstance(source, GpuTensor), "one of the two is on the device"
        _to_host(target, source.on_host, non_blocking=non_blocking, is_whole=is_whole)
    return target


def to_device(host: Tensor, *, non_blocking: bool, is_whole: bool = True) -> None:
    """Account for a copy of `host` to the device; not `is_whole`: it is repeated there.

    Raises:
        CaptureError: inside a capture, unless it will be under way.
    """
    is_free = _is_free("device", host, non_blocking=non_blocking, is_whole=is_whole)

    def begin() -> None:
        journal.note_copy("device", host.nbytes, is_pinned=is_free, is_waited_for=not non_blocking)
        if is_free:
            under_way.start(host, host, current_stream(), is_to_host=False)
        elif not non_blocking:
            under_way.finish()

    graph.submit(begin)


def _to_host(host: Tensor, value: Tensor, *, non_blocking: bool, is_whole: bool = True) -> None:
    """Copy `value`, data of the device, to `host`; CaptureError as for `to_device`."""
    is_free = _is_free("host", host, non_blocking=non_blocking, is_whole=is_whole)

    def copy() -> None:
        journal.note_copy("host", host.nbytes, is_pinned=is_free, is_waited_for=not is_free)
        if is_free:
            under_way.start(host, value, current_stream(), is_to_host=True)
        else:
            under_way.finish()
            host.copy_(value)

    graph.submit(copy)


def _is_free(to: Literal["device", "host"], host: Tensor, *, non_blocking: bool, is_whole: bool) -> bool:
    """Say whether a copy will be under way; inside a capture, raise if not."""
    is_free = non_blocking and is_pinned(host) and host.is_contiguous() and is_whole
    if not is_free:
        why = "for which the host waits" if not non_blocking else "of memory that is not pinned, or in pieces,"
        graph.refuse_in_capture(f"a copy to the {to} {why}")
    return is_free
