"""How weights are held: as numbers of the compute type, or in 8 bits (`headrace_kernels.int8_weights`).

In 8 bits are the weights of linear layers and experts. As numbers stay the embedding, a head that is tied to it, the
router's weights, and `LATENT_UP`, which prompts and decode rows multiply in different ways.
"""

from __future__ import annotations

import hashlib
import math
from enum import Enum

import torch

from headrace_core.errors import StartupError
from headrace_core.families.weights import Part, Weight

_NUMBERS = (Part.EMBEDDING, Part.ROUTER, Part.LATENT_UP)
_SCALE_BYTES = 4


class WeightsDtype(Enum):
    """See above; the settings' names."""

    AUTO = "auto"
    INT8 = "int8"


def check_int8(device: str) -> None:
    """Refuse what can't be multiplied in 8 bits.

    Raises:
        StartupError: NO_INT8.
    """
    if device != "cpu":
        raise StartupError(
            "NO_INT8", f"--weights-dtype int8: there are no such kernels for --device {device}; use auto"
        )


def num_bytes(weight: Weight, dtype: torch.dtype, weights_dtype: WeightsDtype) -> int:
    """Return the bytes that `weight` takes in compute type `dtype`."""
    count = math.prod(weight.shape)
    if weights_dtype is WeightsDtype.INT8 and _is_multiplied(weight):
        return count + _SCALE_BYTES * weight.shape[0]
    return count * (4 if weight.is_float32 else dtype.itemsize)


def int8_fingerprint(fingerprint: str) -> str:
    """Return the fingerprint of a model whose weights are in 8 bits: it gives other tokens."""
    return hashlib.blake2b(f"{fingerprint} int8".encode(), digest_size=16).hexdigest()


def _is_multiplied(weight: Weight) -> bool:
    """Return whether a linear layer or an expert has it. A tied head is the embedding, and no weight of its own."""
    return len(weight.shape) == 2 and weight.place.part not in _NUMBERS
