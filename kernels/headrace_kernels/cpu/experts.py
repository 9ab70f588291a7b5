"""`headrace_kernels.experts` compiled: packed in panels, gate's beside up's; `src/moe_experts.cpp`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headrace_kernels.cpu import panels
from headrace_kernels.cpu.arguments import ADDRESS, INT, check, structure
from headrace_kernels.cpu.library import call, takes
from headrace_kernels.cpu.panels import NO_SCALES, PanelScales
from headrace_kernels.reference import experts as reference
from headrace_kernels.routing_rule import RoutedTokens

_MoeExperts = structure(
    "_MoeExperts",
    x=ADDRESS,
    x_stride=INT,
    num_tokens=INT,
    hidden=INT,
    experts=ADDRESS,
    weights=ADDRESS,
    num_per_token=INT,
    first_local=INT,
    num_local=INT,
    gate_up=ADDRESS,
    down=ADDRESS,
    gate_up_scales=ADDRESS,
    gate_up_scale_columns=INT,
    gate_up_scale_lanes=INT,
    down_scales=ADDRESS,
    down_scale_columns=INT,
    down_scale_lanes=INT,
    width=INT,
    residual=ADDRESS,
    residual_stride=INT,
    y=ADDRESS,
    y_stride=INT,
)
_ENTRIES = {torch.int8: "int8_moe_experts", torch.uint8: "fp8_moe_experts"}
_packed_shape = cache(panels.packed_shape)


class PackedExperts:
    """See `headrace_kernels.experts.Experts`."""

    def __init__(self, count: int, hidden: int, width: int, like: Tensor) -> None:
        self._width, self._hidden = width, hidden
        self._gate_up = like.new_empty(count, *panels.packed_shape(2 * panels.padded(width), hidden, like.dtype))
        self._down = like.new_empty(count, *panels.packed_shape(hidden, width, like.dtype))

    def put(self, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert] = side_by_side(panels.pack(gate), panels.pack(up))
        self._down[expert] = panels.pack(down)

    def copy(self, expert: int, other: PackedExperts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert], self._down[expert] = other._gate_up[its], other._down[its]

    def block_size(self, num_assignments: int) -> None:
        """See `headrace_kernels.experts.Experts`."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`; a token's experts are added up in their order, rounded once."""
        return run(routed, residual, self._gate_up, self._down, self._width)


class ScaledExperts:
    """See `headrace_kernels.experts.Experts`: what packed experts in 8 bits do however they were brought there."""

    def __init__(self, width: int, gate_up: Tensor, down: Tensor, scales: tuple[PanelScales, PanelScales]) -> None:
        """Args: `scales` of gate and up, and of down."""
        self._width, self._gate_up, self._down, self._scales = width, gate_up, down, scales

    def copy(self, expert: int, other: ScaledExperts, its: int) -> None:
        """See `headrace_kernels.experts.Experts`."""
        self._gate_up[expert], self._down[expert] = other._gate_up[its], other._down[its]
        for mine, theirs in zip(self._scales, other._scales, strict=True):
            mine.values[expert] = theirs.values[its]

    def block_size(self, num_assignments: int) -> None:
        """See `headrace_kernels.experts.Experts`."""

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `headrace_kernels.experts.Experts`; a token's experts are added up in their order, rounded once."""
        return run(routed, residual, self._gate_up, self._down, self._width, scales=self._scales)


def side_by_side(gate: Tensor, up: Tensor) -> Tensor:
    """Return the panels of `gate`, each with that of `up` behind it."""
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def run(
    routed: RoutedTokens,
    residual: Tensor,
    gate_up: Tensor,
    down: Tensor,
    width: int,
    *,
    scales: tuple[PanelScales, PanelScales] | None = None,
) -> Tensor:
    """Return [T, N] for experts of `width`, packed, as `PackedExperts` keeps them; in 8 bits with `scales` of both.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    x, experts, weights = routed.x, routed.experts.contiguous(), routed.weights.contiguous()
    num_tokens, num_per_token = len(x), experts.shape[1]
    check("x", x, (num_tokens, residual.shape[1]), residual.dtype)
    check("residual", residual, (num_tokens, x.shape[1]), x.dtype)
    check("experts", experts, (num_tokens, num_per_token), torch.int64)
    check("weights", weights, (num_tokens, num_per_token), torch.float32)
    dtype = x.dtype if scales is None else down.dtype
    check("down", down, (len(down), *_packed_shape(x.shape[1], width, dtype)), dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = _MoeExperts(
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        experts.data_ptr(),
        weights.data_ptr(),
        num_per_token,
        0,
        len(down),
        gate_up.data_ptr(),
        down.data_ptr(),
        *(field for each in scales or () for field in each.fields()),
        *(() if scales else 2 * NO_SCALES),
        width,
        residual.data_ptr(),
        residual.stride(0),
        y.data_ptr(),
        x.shape[1],
    )
    call(_ENTRIES.get(down.dtype, "moe_experts"), arguments, x.dtype)
    return y


def empty(count: int, hidden: int, width: int, like: Tensor) -> PackedExperts | reference.ListedExperts:
    """See `headrace_kernels.experts.empty_experts`."""
    return (PackedExperts if takes(like.dtype) else reference.ListedExperts)(count, hidden, width, like)
