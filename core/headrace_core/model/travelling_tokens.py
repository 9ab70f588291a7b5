"""Tokens as bytes that travel to their experts: values of the compute type, or FP8 with a scale for each 128 of them.

What is sent in FP8 is `act_quant`'s, as DeepEP's dispatch sends it, and whoever gets it brings it back to the compute
type. A row's bytes depend on that row alone. Results do not travel so: what is added up is of the compute type.

With FP8 *every* token reaches its experts rounded so, also one that stays where it is, or whose worker sends none: what
experts are given does not depend on where they are, so workers of any layout have one fingerprint, and replicas and
moved experts the same bits. Shared experts, which are where the token is, are given it as it was.

Letters: T tokens, N hidden.
"""

from __future__ import annotations

import hashlib

import torch
from headrace_kernels.act_quant import act_quant, dequantise
from headrace_kernels.experts import Experts
from headrace_kernels.fp8_groups import FP8, num_groups
from headrace_kernels.routing_rule import RoutedTokens
from torch import Tensor

from headrace_core.errors import StartupError
from headrace_core.families.config import ModelConfig
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.layout import ExpertsBy, ParallelLayout


def to_bytes(x: Tensor, dtype: DispatchDtype) -> Tensor:
    """Return the tokens `x` [T, N] as uint8 [T, `dtype.token_bytes`]."""
    if dtype is DispatchDtype.AUTO:
        return x.contiguous().view(torch.uint8)
    values, scales = act_quant(x)
    return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), dim=1)


def from_bytes(sent: Tensor, like: Tensor, dtype: DispatchDtype) -> Tensor:
    """Return the tokens, of the width and dtype of `like`, that `to_bytes` made `sent` [T, bytes] of."""
    if dtype is DispatchDtype.AUTO:
        return sent.contiguous().view(like.dtype)
    width = like.shape[1]
    values, scales = sent.split([width, 4 * num_groups(width)], dim=1)
    return dequantise(values.contiguous().view(FP8), scales.contiguous().view(torch.float32)).to(like.dtype)


class RoundedTokens:
    """`LayerExperts` that are where the tokens are, and are given them as if they had travelled in FP8."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    def block_size(self, num_assignments: int) -> int | None:
        """See `Experts`."""
        return self._experts.block_size(num_assignments)

    def __call__(self, routed: RoutedTokens, residual: Tensor) -> Tensor:
        """See `Experts`."""
        x = from_bytes(to_bytes(routed.x, DispatchDtype.FP8), routed.x, DispatchDtype.FP8)
        return self._experts(routed._replace(x=x), residual)


def check_fp8_dispatch(config: ModelConfig, layout: ParallelLayout) -> None:
    """Refuse a worker whose experts can't be given their tokens so.

    Raises:
        StartupError: NO_FP8_DISPATCH.
    """
    problem = None
    if not config.moe.num_experts:
        problem = "the network has no experts"
    elif layout.size > 1 and layout.experts_by is ExpertsBy.COLUMNS:
        problem = "experts divided by columns are no place that tokens travel to; use --experts ep, or auto"
    if problem:
        raise StartupError("NO_FP8_DISPATCH", f"--dispatch-dtype fp8_e4m3: {problem}")


def dispatch_fingerprint(fingerprint: str, dtype: DispatchDtype) -> str:
    """Return the fingerprint of a model whose tokens travel so: in FP8 it may give other tokens."""
    if dtype is DispatchDtype.AUTO:
        return fingerprint
    return hashlib.blake2b(f"{fingerprint} dispatch {dtype.value}".encode(), digest_size=16).hexdigest()
