"""A pretended GPU, for tests on machines without one: device `cuda`, with its data on the CPU.

    with pretend_gpu():
        model = load_model(folder, device="cuda")

What it shows: an operation that mixes the GPU's tensors with the host's, and a kernel that is given the host's; inside
a capture of a CUDA graph, anything a graph cannot hold: values read, sizes that depend on them, copies the host waits
for or whose memory is not pinned; replays that are not what was captured, because a capture runs nothing and a replay
all; memory that is read before anybody wrote to it (new memory holds NaN and -1); copies that nobody waited for.
`recording()` lists for what the host waited, what was copied and what was launched, waits and copies with their lines.

What it cannot show: speed; whether a kernel compiles, or computes on a GPU what Triton's interpreter computes; races
between streams, or inside a kernel; the memory pool of a graph; what depends on a GPU's own numerics or random numbers.

It patches torch and Triton's interpreter, for the whole process, while it is in force; kernels run in it if they were
imported with TRITON_INTERPRET=1. Not known to it: operations that give a tensor another shape in place, autograd, more
than one GPU. Tensors of device `meta` can be made beside it, and used in nothing that makes others of them.
"""

from __future__ import annotations

from headrace_core.testing.pretend_gpu.device import pretend_gpu
from headrace_core.testing.pretend_gpu.graph import CaptureError
from headrace_core.testing.pretend_gpu.journal import Copy, Journal, Wait, recording
from headrace_core.testing.pretend_gpu.rules import DevicesMixedError
from headrace_core.testing.pretend_gpu.under_way import UnderWayError

__all__ = [
    "CaptureError",
    "Copy",
    "DevicesMixedError",
    "Journal",
    "UnderWayError",
    "Wait",
    "pretend_gpu",
    "recording",
]
