"""What a worker would use on this machine, and what it can't have: asked of the functions that workers ask."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import torch
from headrace_kernels import backend
from headrace_kernels.backend import instruction_set, what_is_missing
from headrace_kernels.cpu import build, library
from headrace_kernels.dispatch import TABLE, backend_of, objection

from headrace_core.checkpoint.memory import available_bytes
from headrace_core.checkpoint.torch_scalar import TORCH_DTYPES
from headrace_core.config import WorkerSettings
from headrace_core.scalar import Scalar
from headrace_core.transfer.transports import TRANSPORTS, usable
from headrace_core.worker.loading import choose_kernels

_DTYPES = [name for name in get_args(WorkerSettings.model_fields["dtype"].annotation) if name != "auto"]


def capabilities(settings: WorkerSettings) -> dict[str, Any]:
    """Return what a worker with `settings` would use, for JSON; no checkpoint is read. Chooses this process' kernels.

    Reasons why something can't be had are in words, empty where it can.

    Raises:
        StartupError: NO_GPU, NO_BACKEND, NO_TRANSPORT: a worker would not start.
    """
    free_bytes = available_bytes(settings.device)
    choose_kernels(settings)
    nothing = torch.empty(0, device=settings.device)
    kernels = backend(nothing)
    return {
        "device": settings.device,
        "dtype": settings.dtype,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "weights_dtype": settings.weights_dtype,
        "kernels": kernels,
        "kernels_problem": objection(kernels, settings.device) or "",
        "families": dict(Counter(backend_of(family, nothing) for family in TABLE)),
        "threads": torch.get_num_threads(),
        "free_bytes": free_bytes,
        "transports": usable(settings.transport, has_tls=settings.tls is not None),
        "transport_problems": {name: it.probe() for name, it in TRANSPORTS.items() if it.is_automatic},
        "torch": _torch(),
        "compiled": _compiled(),
    }


def _torch() -> dict[str, Any]:
    """Return which torch this is, and the GPUs that it sees."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "rocm": torch.version.hip or "",
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "gpu_kernels_problem": objection("triton", "cuda") or "",
    }


def _compiled() -> dict[str, Any]:
    """Return what there is of the compiled CPU kernels, and what would build them."""
    problem = what_is_missing("cpu") or ""
    try:
        sets, compiler, no_compiler = list(build.isas()), "", ""
    except build.NoCompilerError as error:
        sets, compiler, no_compiler = [], "", str(error)
    if sets:
        try:
            compiler = " ".join(build.find_compiler())
        except build.NoCompilerError as error:
            no_compiler = str(error)
    return {
        "problem": problem,
        "isa": instruction_set(),
        "dtypes": [name for name in _DTYPES if library.takes(TORCH_DTYPES[Scalar(name)])],
        "is_built": build.is_current(build.LIBRARY),
        "sets": sets,
        "compiler": compiler,
        "no_compiler": no_compiler,
    }
