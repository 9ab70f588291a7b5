"""How far a token's bits are promised.

FAST: a sum's order may depend on what shares the step, how a prompt was cut, or whether a token was prompt or output.
The last bits may differ, and with them, rarely, a token.

EXACT: they do not. A token's result, to the last bit, is the same in any batch, however its prompt was cut into chunks
and pages, and on a prefill worker, a decode worker or both in one. So every token, of a prompt too, is computed as a
row of its own over its context, by kernels that sum in one order. Prompts take longer.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import torch
from headrace_kernels.cpu import library

from headrace_core.errors import StartupError
from headrace_core.families.config import ModelConfig
from headrace_core.kv.layout import CacheDtype
from headrace_core.ranks.layout import ParallelLayout


class Numerics(Enum):
    """See above; the settings' names."""

    FAST = "fast"
    EXACT = "exact"


def check_exact(config: ModelConfig, kernels: str, dtype: torch.dtype, cache_dtype: CacheDtype) -> None:
    """Refuse what can't be computed exactly.

    Raises:
        StartupError: NO_EXACT, with what stands in the way.
    """
    problem = None
    if kernels != "cpu":
        problem = f"kernels on {kernels} sum in an order of their own; compiled CPU kernels (--kernels cpu) are needed"
    elif not library.takes(dtype):
        problem = f"there are no such kernels for {str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
    elif config.is_attention_sparse:
        problem = "the scores by which sparse attention chooses are summed by torch, in an order of its own"
    elif cache_dtype is CacheDtype.FP8_E4M3:
        problem = "there are no such kernels for --kv-cache-dtype fp8_e4m3; use auto"
    if problem:
        raise StartupError("NO_EXACT", f"--numerics exact: {problem}; or use --numerics fast")


def exact_fingerprint(fingerprint: str, layout: ParallelLayout) -> str:
    """Return the fingerprint of a model computed exactly, on this machine's instruction set and in `layout`.

    Ranks' partial sums are added in an order of their own, so layouts that add up other parts give other bits.
    """
    said = f"{fingerprint} exact {library.isa()}"
    if layout.size > 1:
        said += f" {layout.sums}"
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
