"""Programmatic dependent launch (sm_90): a kernel's programs start while the kernel before it on the stream still runs.

A kernel launched with `dependent_launch` may start once every program of the one before has started and said so, or
has ended; it says so itself at once. Until `wait_for_earlier` returns it touches no global memory, not even to read:
earlier kernels may still be writing there, or reading what it will overwrite. It returns when the kernel before has
ended and what that stored can be seen. That kernel waited in turn, and a kernel launched without this starts only when
all before it have ended; so by induction everything earlier on the stream has, and what it stored can be seen, since
each wait acquires what the one before had acquired. This holds whatever stands between, in a CUDA graph too, whose
capture turns the same attribute into the same kind of edge.

What a kernel may do before is to have weights brought into the L2 cache. That is a hint: no value reaches the kernel,
and since the L2 cache is the one place where all multiprocessors' stores meet, no stale value can reach it later.

Gained is the gap between two kernels, about a microsecond, and the first weights' way from memory. None has run on a
GPU yet: not measured.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace_kernels.gpu.launch import is_interpreted, is_recording, target

IS_ON = True
"""False: every kernel starts when the one before it has ended."""


def dependent_launch(tensor: Tensor) -> dict[str, Any]:
    """Return the constant IS_DEPENDENT of a kernel that calls `wait_for_earlier`, and the option that goes with it."""
    if IS_ON and target() == "cuda" and (is_recording() or (not is_interpreted() and _has_it(tensor.device))):
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


@cache
def _has_it(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_earlier() -> None:
    """Let the next kernel start, and wait until all before this one have ended: before any access to global memory."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def prefetch(pointers) -> None:
    """Have the 128 bytes around each of `pointers` brought into the L2 cache; they must lie inside a tensor."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_rows(row_pointers, num_columns, LINES: tl.constexpr) -> None:
    """Have the first LINES * 128 bytes of each row, of `num_columns` contiguous elements, brought into the L2 cache."""
    COLUMNS: tl.constexpr = 1024 // row_pointers.dtype.element_ty.primitive_bitwidth
    columns = tl.minimum(tl.arange(0, LINES) * COLUMNS, num_columns - 1)
    prefetch(row_pointers[:, None] + columns[None, :])
