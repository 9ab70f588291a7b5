"""Every kernel against its specification: on the GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from headrace_kernels import use_backend

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by triton when the first kernel is defined, which happens in the tests' imports.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
