"""Compiled CPU kernels against their specifications; skipped where their library is not, which `make` builds."""

from __future__ import annotations

import pytest
import torch
from headrace_kernels import use_backend
from headrace_kernels.backend import what_is_missing


@pytest.fixture(autouse=True)
def compiled():
    problem = what_is_missing("cpu")
    if problem:
        pytest.skip(problem)
    with use_backend("cpu"):
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param
