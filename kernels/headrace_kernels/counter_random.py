"""Random numbers that are a pure function of where they are needed: no generator, no state to hand over.

Shapes: L rows. A number depends on (seed, sample index, position) of its own row alone, so that a CPU and a GPU, and
any worker that continues a sequence, draw the same.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Philox-4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def uniform(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    """Return a number in [0, 1), a multiple of 2^-53, for each row.

    Args:
        seeds: [L] int64, the 64 bits of a seed in [0, 2^64).
        sample_indices: [L] int64 in [0, 2^32).
        positions: [L] int64 in [0, 2^32).

    Returns:
        [L] float64.
    """
    c0, c1 = positions & _MASK, sample_indices & _MASK
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds & _MASK, seeds >> 32 & _MASK
    for _ in range(_ROUNDS):
        # Products of 64 bits wrap around the sign; their halves are right all the same.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return ((c0 << 21) | (c1 >> 11)).double() * 2.0**-53
