"""A call of a kernel family, as ahead-of-time compilation makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AotCase:
    """A call whose launches must compile for every target.

    `run` calls a family's entry with tensors on the meta device, of the shapes of a real model. `uses_matrix_units`
    says whether its main kernel must come out with matrix instructions (wgmma or mma; mfma).
    """

    name: str
    run: Callable[[], object]
    uses_matrix_units: bool = False
