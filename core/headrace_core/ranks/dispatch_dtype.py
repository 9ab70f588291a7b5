"""As what tokens travel to their experts: the settings' names, and the bytes of one. Torch-free."""

from __future__ import annotations

from enum import Enum

GROUP = 128
"""Values that share a scale, as `headrace_kernels.fp8_groups` has it."""
_SCALE_BYTES = 4


class DispatchDtype(Enum):
    """The settings' names."""

    AUTO = "auto"
    """As values of the compute type."""
    FP8 = "fp8_e4m3"
    """A byte for each value, and a float32 scale for each 128 of them."""

    def token_bytes(self, hidden: int, itemsize: int) -> int:
        """Return what a token of `hidden` values takes, `itemsize` bytes each in the compute type."""
        if self is DispatchDtype.AUTO:
            return hidden * itemsize
        return hidden + _SCALE_BYTES * -(-hidden // GROUP)
