"""Launch Triton kernels, or record what would be launched.

Every kernel is launched by `launch`. While `recording` is in force nothing runs: the launches are kept instead, with
everything that Triton would specialise on, and ahead-of-time compilation takes them from there. So what is compiled
without a GPU is what the launchers launch on one: the same shapes, tiles and options.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

Target = Literal["cuda", "hip"]

# What recorded launches assume of the GPU: an H200's and an MI300X's number of multiprocessors.
_RECORDED_SMS: dict[Target, int] = {"cuda": 132, "hip": 304}
_INTERPRETED_SMS = 4

_TL_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was recorded: the kernel, its positional arguments, its constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class _Recording:
    target: Target
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` on `grid` with `args`, its run-time arguments, and `constants`, its compile-time ones.

    An empty grid runs nothing.
    """
    recording_now = _recording.get()
    if recording_now is not None:
        recording_now.launches.append(Launch(kernel, grid, args, constants, num_warps, num_stages))
    elif 0 not in grid:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)


@contextmanager
def recording(target: Target) -> Generator[list[Launch]]:
    """Record launches, as for `target`, instead of running them; yields the list that they are appended to."""
    state = _Recording(target, [])
    token = _recording.set(state)
    try:
        yield state.launches
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """True while launches are recorded instead of run."""
    return _recording.get() is not None


def is_interpreted() -> bool:
    """True when Triton's interpreter runs the kernels on a CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def target() -> Target:
    """Return the kind of GPU that launches are for."""
    recording_now = _recording.get()
    if recording_now is not None:
        return recording_now.target
    return "hip" if torch.version.hip else "cuda"


def num_sms(tensor: Tensor) -> int:
    """Return how many multiprocessors the GPU of `tensor` has; a small number when interpreted."""
    if _recording.get() is not None:
        return _RECORDED_SMS[target()]
    return _device_sms(tensor.device) if tensor.is_cuda else _INTERPRETED_SMS


@cache
def _device_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def operand_dtype(tensor: Tensor) -> tl.dtype:
    """Return the type in which a kernel multiplies values of `tensor`.

    It is the tensor's own, but for the interpreter: that computes on bfloat16's bit patterns, wrongly and in silence,
    so there every operand is brought to float32 right after it is loaded.
    """
    return tl.float32 if is_interpreted() and _recording.get() is None else _TL_DTYPES[tensor.dtype]
