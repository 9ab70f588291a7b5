"""`headrace_kernels.linear` over weights in 8 bits (`int8_weights`), in plain torch: the specification, and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.int8_weights import Int8Weight, check_width, quantise
from headrace_kernels.rms_norm import rms_norm


def pack(weight: Tensor) -> Int8Weight:
    """Return `weight` [O, I] in 8 bits: values [O, I], scales [O]."""
    check_width(weight.shape[1])
    values, scales = quantise(weight)
    return Int8Weight(values, scales.squeeze(-1))


def packed_linear(x: Tensor, packed: Int8Weight, bias: Tensor | None, num_outputs: int) -> Tensor:
    """See `headrace_kernels.linear.Linear.__call__`; rounded once."""
    return _product(x, packed, bias).to(x.dtype)


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor | None, packed: Int8Weight, eps: float, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """See `headrace_kernels.linear.Linear.after_norm`; what the norm gives is not rounded before it is quantised."""
    wide = x.float()
    norm_weight = wide.new_ones(x.shape[1]) if norm_weight is None else norm_weight.float()
    return _product(rms_norm(wide, norm_weight, eps), packed, bias).to(x.dtype)


def packed_linear_add(x: Tensor, packed: Int8Weight, residual: Tensor, bias: Tensor | None) -> Tensor:
    """See `headrace_kernels.linear.Linear.added_to`; rounded once."""
    return (_product(x, packed, bias) + residual.float()).to(x.dtype)


def _product(x: Tensor, packed: Int8Weight, bias: Tensor | None) -> Tensor:
    """Return [T, O] float32; whole numbers are added up as float64, which holds every such sum."""
    values, scales = quantise(x)
    whole = torch.matmul(values.double(), packed.values.double().T)
    product = whole.float() * packed.scales * scales
    return product if bias is None else product + bias.float()
