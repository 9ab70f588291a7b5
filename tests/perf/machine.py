"""What figures were taken on: the processor with the flags that decide a CPU's speed here, the commit, the date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """Return it by name."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpuinfo().get("model name", platform.processor()),
        "cpu_flags": " ".join(cpu_flags()),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def cpu_flags() -> list[str]:
    """Return which of the flags that decide a CPU's speed here it has."""
    flags = _cpuinfo().get("flags", "").split()
    return [flag for flag in _FLAGS if flag in flags]


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()
