"""Every kernel against its specification: on the GPU where there is one, else on a pretended one, interpreted.

To Triton's interpreter the pretended GPU (`headrace_core.testing.pretend_gpu`) adds that tensors of the host and of the
device do not mix, and that captured decode steps are captured.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from headrace_core.testing.pretend_gpu import pretend_gpu
from headrace_kernels import use_backend

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by triton when the first kernel is defined, which happens in the tests' imports.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture(autouse=True)
def gpu():
    with nullcontext() if HAS_GPU else pretend_gpu():
        yield


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interpreter_patched_once():
    """Triton's interpreter patches its language at every call of a device function, most of the time that tests take.

    The patches are the same each time, so the first ones stay.
    """
    if HAS_GPU:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules not in patched:
            patched.add(modules)
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


@pytest.fixture(autouse=True, scope="session")
def products_alike_everywhere():
    """Let each element of the interpreter's products be summed alike, wherever it stands in its tile.

    It calls numpy's matmul, and on some processors BLAS sums the rows at a tile's edge in another order. A GPU's matrix
    units do not, and kernels promise results that do not depend on a row's place.
    """
    if HAS_GPU:
        yield
        return
    from triton.runtime import interpreter

    def matmul(a, b, *, dtype):
        return np.einsum("...mk,...kn->...mn", a, b, dtype=dtype, casting="same_kind")

    interpreter.np = SimpleNamespace(**{**vars(np), "matmul": matmul})
    yield
    interpreter.np = np
