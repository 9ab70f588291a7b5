"""The gate of a gated network: silu(gate) * up.

Shapes: I width. Bytes moved: 3 * I * itemsize a row, so it is bound by memory bandwidth.

`silu_mul` is the entry; `silu_mul_ref` is the specification it is tested against.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace_kernels.dispatch import select


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., I], for `gate_up` [..., 2 * I]: gate columns, then up columns."""
    return select("silu_mul", gate_up).silu_mul(gate_up)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """Specification of `silu_mul` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
