"""What the tests of compiled kernels share: inputs with NaN around them, and how near a result must be."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")
# Of the largest value: float32 sums in another order; bfloat16 rounded once, from float32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return random numbers whose rows lie apart in a larger tensor of NaN: before, between and behind them."""
    if not shape[-1] or not shape[0]:
        return torch.empty(shape, dtype=dtype)
    around = torch.full((shape[0] + 2, *shape[1:-1], shape[-1] + 5), NAN, dtype=dtype)
    view = around[1:-1, ..., 3:-2]
    view.copy_(torch.randn(shape) * scale)
    return view


def plain(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return random numbers, contiguous."""
    return (torch.randn(shape) * scale).to(dtype)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Compare with what the specification gives for the same inputs in float32."""
    assert got.shape == expected.shape
    if not got.numel():
        return
    worst = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
    assert worst <= TOLERANCES[got.dtype], f"relative difference {worst}"


def on_threads(count: int, run):
    """Return what `run()` gives on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)
