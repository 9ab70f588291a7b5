"""How much memory this process may still take, and the refusal when a model needs more."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from headrace_core.errors import CheckpointError, StartupError

_MIB = 1 << 20
_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
_UNLIMITED = 1 << 60
WORKING_BYTES = 256 * _MIB
"""What activations, packing and the runtime may need on a CPU beside weights and pages."""


def available_bytes(device: str = "cpu") -> int:
    """Return the memory that can be taken: a GPU's free memory, or what the machine has without swapping.

    For the machine it is the control group's limit if that is less.

    Raises:
        StartupError: NO_GPU, `device` is "cuda" and this process sees no GPU.
    """
    if device == "cuda":
        return _available_gpu_bytes()
    limits = [psutil.virtual_memory().available]
    for limit, usage, inactive in (
        (_CGROUP_V2 / "memory.max", _CGROUP_V2 / "memory.current", "inactive_file"),
        (_CGROUP_V1 / "memory.limit_in_bytes", _CGROUP_V1 / "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _number(limit), _number(usage)
        if most is not None and used is not None and most < _UNLIMITED:
            limits.append(max(0, most - used + _inactive(limit.with_name("memory.stat"), inactive)))
    return min(limits)


def check_fits(weight_bytes: int, kv_pool_bytes: int, available: int, working_bytes: int = WORKING_BYTES) -> None:
    """Check that weights, pages and a working margin fit.

    Raises:
        CheckpointError: MODEL_TOO_LARGE, with the figures.
    """
    needed = weight_bytes + kv_pool_bytes + working_bytes
    if needed > available:
        raise CheckpointError(
            "MODEL_TOO_LARGE",
            f"the model needs {needed // _MIB} MiB (weights {weight_bytes // _MIB}, KV pool {kv_pool_bytes // _MIB}, "
            f"working margin {working_bytes // _MIB}) and {available // _MIB} MiB are available; "
            "free memory, lower --kv-pool-mib (on a GPU also --max-step-tokens or --max-context-tokens), "
            "or use a larger machine or GPU",
        )


def _available_gpu_bytes() -> int:
    if not torch.cuda.is_available():
        build = "has no GPU build" if torch.version.cuda is None and torch.version.hip is None else "sees no GPU"
        raise StartupError(
            "NO_GPU",
            f"--device cuda: torch {torch.__version__} {build} here; use --device cpu, or see docs/operations.md",
        )
    return torch.cuda.mem_get_info()[0]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _inactive(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key + " ")), 0)
