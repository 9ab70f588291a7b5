"""Which implementation the kernels run on."""

from __future__ import annotations

from typing import Literal

Backend = Literal["triton", "reference"]


def backend() -> Backend:
    """Return the backend in use; "reference", plain torch, is the only one there is so far."""
    return "reference"
