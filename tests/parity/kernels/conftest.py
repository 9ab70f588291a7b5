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
