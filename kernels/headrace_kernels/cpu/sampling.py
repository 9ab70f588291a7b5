"""`headrace_kernels.sampling` compiled: `src/sampling.cpp`, a row a task."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.counter_random import uniforms
from headrace_kernels.cpu.arguments import ADDRESS, INT, structure
from headrace_kernels.cpu.library import call
from headrace_kernels.draws import Draws

_Sampling = structure(
    "_Sampling",
    logits=ADDRESS,
    stride=INT,
    num_rows=INT,
    vocab_size=INT,
    temperatures=ADDRESS,
    top_p=ADDRESS,
    min_p=ADDRESS,
    top_k=ADDRESS,
    uniforms=ADDRESS,
    tokens=ADDRESS,
)


def sample_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """See `headrace_kernels.sampling.sample_tokens`."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    columns = [
        column.contiguous()
        for column in (
            draws.temperatures,
            draws.top_p,
            draws.min_p,
            draws.top_k,
            uniforms(draws.seeds, draws.sample_indices, draws.positions),
        )
    ]
    arguments = _Sampling(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        *(column.data_ptr() for column in columns),
        tokens.data_ptr(),
    )
    call("sampling", arguments, torch.float32)
    return tokens
