"""Torch's own values for `headrace_core.scalar`."""

from __future__ import annotations

import torch

from headrace_core.scalar import Scalar

TORCH_DTYPES: dict[Scalar, torch.dtype] = {scalar: getattr(torch, scalar.value) for scalar in Scalar}


def scalar_of(dtype: torch.dtype) -> Scalar:
    """Return the scalar that `dtype` is."""
    return Scalar(str(dtype).removeprefix("torch."))
