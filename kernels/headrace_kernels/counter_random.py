"""Random numbers that are a pure function of where they are needed: no generator, no state to hand over.

A number depends on (seed, sample index, position) of its own row alone, so that a CPU and a GPU, and any worker that
continues a sequence, draw the same. The GPU computes them where it draws (`gpu/sampling.py`).
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Philox-4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def uniforms(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    """Return `uniform` of each row, [L] float64, for columns [L] int64; a seed's 64 bits may look negative there.

    By Python's integers: for the rows of a step, a tenth of what a hundred small operations on tensors cost.
    """
    rows = zip(seeds.tolist(), sample_indices.tolist(), positions.tolist(), strict=True)
    numbers = [uniform(seed, sample_index, position) for seed, sample_index, position in rows]
    return torch.tensor(numbers, dtype=torch.float64, device=seeds.device)


def uniform(seed: int, sample_index: int, position: int) -> float:
    """Return a number in [0, 1), a multiple of 2^-53, for the draw at `position` of sample `sample_index` under `seed`.

    Args:
        seed: in [0, 2^64), or the signed integer of the same 64 bits.
        sample_index: in [0, 2^32).
        position: in [0, 2^32), counted from the prompt's first token.
    """
    words = philox((position, sample_index, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four random 32-bit words for a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
