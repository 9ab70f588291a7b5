"""The groups of fp8 numbers that share a scale: what entries and launchers of every fp8 family agree on."""

from __future__ import annotations

import torch

GROUP = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# A group of zeros gets a scale all the same.
SMALLEST_MAXIMUM = 1e-10


def num_groups(width: int) -> int:
    """Return how many groups of 128 hold `width` values; the last may be short."""
    return -(-width // GROUP)
