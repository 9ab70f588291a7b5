"""Kernels of other projects beside ours, if someone put adapters for them in `.peers/`, which git ignores.

An adapter is a Python file there with one function,

    def peers(case: BenchCase) -> dict[str, Calls]

which returns, for a case it can run (told by `case.family` and `case.shape`), the peer's name and its calls: the same
function on buffers of the same sizes. For other cases it returns an empty dict. Adapters import their project
themselves, from wherever it is installed; nothing of it is part of this repository.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.perf.kernels.bench_case import BenchCase, Calls

Adapter = Callable[[BenchCase], dict[str, Calls]]


def load_adapters(folder: Path) -> list[Adapter]:
    """Return the adapters in `folder`, none if it does not exist; ValueError if a file there has no `peers`."""
    adapters: list[Adapter] = []
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "peers"):
            raise ValueError(f"{path} must define peers(case) -> dict of name to calls (tests/perf/kernels/peers.py)")
        adapters.append(module.peers)
    return adapters


def peers_of(case: BenchCase, adapters: Sequence[Adapter]) -> dict[str, Calls]:
    """Return the case's own peers and those that the adapters add."""
    found = dict(case.peers)
    for adapter in adapters:
        found |= adapter(case)
    return found
