"""Which tiles are worth trying: those whose values a program has room for."""

from __future__ import annotations

# Of one multiprocessor of an H100 or H200, less what a program keeps besides.
_SHARED_BYTES = 227 * 1024
# Of 255: addresses, loads under way and temporaries take the others.
_VALUES_PER_THREAD = 128


def fits(num_warps: int, *, shared_bytes: int = 0, values: int = 0) -> bool:
    """Say whether a program of so many warps can load `shared_bytes` ahead and hold `values` of 32 bits."""
    return shared_bytes <= _SHARED_BYTES and values <= _VALUES_PER_THREAD * 32 * num_warps
