"""Tile sizes and options of kernels: from a measurement where there is one, else the launcher's own default.

`make tune` measures candidates on the GPU at hand and writes `tuned/<device name>.json` beside this file: for each
family and key the best configuration, its time, the date and the versions. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from headrace_kernels.gpu.launch import is_interpreted

Config = Mapping[str, int]
"""Compile-time constants of a kernel by name, `num_warps` and `num_stages` among them."""

TUNED = Path(__file__).parent / "tuned"

_candidate: ContextVar[tuple[str, str | None, Config] | None] = ContextVar("candidate", default=None)
_asked: ContextVar[dict[tuple[str, str], Config] | None] = ContextVar("asked", default=None)


def config(family: str, key: str, default: Config, tensor: Tensor) -> Config:
    """Return the configuration of `family` for the shapes that `key` names, on the GPU of `tensor`."""
    asked = _asked.get()
    if asked is not None:
        asked[family, key] = default
    candidate = _candidate.get()
    if candidate is not None and candidate[0] == family and candidate[1] in (None, key):
        return candidate[2]
    if not tensor.is_cuda or is_interpreted():
        return default
    return _tuned(torch.cuda.get_device_name(tensor.device)).get(family, {}).get(key, default)


@contextmanager
def use_config(family: str, candidate: Config, key: str | None = None) -> Generator[None]:
    """Let `config` answer `candidate` for `family`: how `make tune` tries one for a key, and tests small tiles."""
    token = _candidate.set((family, key, candidate))
    try:
        yield
    finally:
        _candidate.reset(token)


@contextmanager
def asking() -> Generator[dict[tuple[str, str], Config]]:
    """Yield what `config` is asked for meanwhile, the defaults by family and key: what there is to tune in a call."""
    asked: dict[tuple[str, str], Config] = {}
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def tuned_path(device_name: str) -> Path:
    """Return where the configurations measured on a GPU of that name are kept."""
    return TUNED / (device_name.replace(" ", "_").replace("/", "_") + ".json")


@cache
def _tuned(device_name: str) -> dict[str, dict[str, Config]]:
    path = tuned_path(device_name)
    if not path.exists():
        return {}
    families = json.loads(path.read_text())["families"]
    return {family: {key: entry["config"] for key, entry in entries.items()} for family, entries in families.items()}
