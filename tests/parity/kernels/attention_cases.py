"""What the tests of the prefill families share."""

from __future__ import annotations

import torch

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Whole widths and small tiles, for float32 too: what the interpreter takes the least time for.
SMALL_TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 0, "num_warps": 4, "num_stages": 1}


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def nan_around(shape, dtype, device, *, spare=2):
    """Random numbers [*shape] inside a larger tensor of NaN: rows after them, columns beside them."""
    larger = torch.full((shape[0] + spare, *shape[1:-1], shape[-1] + spare), float("nan"), dtype=dtype, device=device)
    view = larger[: shape[0], ..., : shape[-1]]
    view.copy_(torch.randn(shape))
    return view
