"""Copies between host and device, and which of them the host waits for.

As torch does on a GPU: it waits unless it is told not to (`non_blocking`). A copy that it does not wait for is under
way (`under_way`) if the host's memory is pinned and in one piece. What is in pieces goes through memory that torch
takes for it, which is not pinned; what is not pinned goes to the device through the driver's own memory, and to the
host before the host goes on. Of copies between the two, a graph holds only those that will be under way.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from headrace_core.testing.pretend_gpu import graph, journal, under_way
from headrace_core.testing.pretend_gpu.memory import is_pinned, pin, poison
from headrace_core.testing.pretend_gpu.streams import current_stream
from headrace_core.testing.pretend_gpu.tensor import GpuTensor


def to_copy(func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """`aten::_to_copy` from one to the other; CaptureError as for `to_device`."""
    non_blocking = kwargs.pop("non_blocking", False)
    kwargs["device"] = torch.device("cpu")
    if not isinstance(source, GpuTensor):
        to_device(source, non_blocking=non_blocking)
        value: Tensor = func(source, **kwargs)
        if graph.keep(lambda: value.copy_(source)):
            poison(value)
        return GpuTensor(value)
    graph.refuse_in_capture("a copy to new memory of the host")
    value = func(source.on_host, **kwargs)
    # torch pins the new memory if it need not wait.
    host = pin(value.clone()) if non_blocking else value
    _to_host(host, value, non_blocking=non_blocking)
    return host


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten::copy_` from one to the other; CaptureError as for `to_device`."""
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
    is_direct = _is_direct("device", host, non_blocking=non_blocking, is_whole=is_whole)

    def begin() -> None:
        stream = current_stream()
        journal.note_copy("device", host.nbytes, is_pinned=is_direct, is_waited_for=not non_blocking)
        if not non_blocking:
            under_way.finish(under_way.behind(stream))
        elif is_direct:
            under_way.start(host, host, stream, is_to_host=False)

    graph.submit(begin)


def _to_host(host: Tensor, value: Tensor, *, non_blocking: bool, is_whole: bool = True) -> None:
    """Copy `value`, data of the device, to `host`; CaptureError as for `to_device`."""
    is_direct = _is_direct("host", host, non_blocking=non_blocking, is_whole=is_whole)

    def copy() -> None:
        stream = current_stream()
        is_waited_for = not (non_blocking and is_direct)
        journal.note_copy("host", host.nbytes, is_pinned=is_direct, is_waited_for=is_waited_for)
        if is_waited_for:
            under_way.finish(under_way.behind(stream))
            host.copy_(value)
        else:
            under_way.start(host, value, stream, is_to_host=True)

    graph.submit(copy)


def _is_direct(to: Literal["device", "host"], host: Tensor, *, non_blocking: bool, is_whole: bool) -> bool:
    """Say whether the copy is one of pinned memory itself; raise inside a capture if no graph can hold it."""
    is_direct = is_pinned(host) and host.is_contiguous() and is_whole
    if not non_blocking:
        graph.refuse_in_capture(f"a copy to the {to} for which the host waits")
    elif not is_direct:
        graph.refuse_in_capture(f"a copy to the {to} of memory that is not pinned, or in pieces,")
    return is_direct
